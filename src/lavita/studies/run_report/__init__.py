"""A static page of training runs: `page.write_report`."""
