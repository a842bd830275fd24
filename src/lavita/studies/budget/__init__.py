"""`lavita train --minutes`: choices from what was measured, and a training that ends on time."""
