"""What an evaluation prints and writes: JSON, tables, a page, a comparison."""
