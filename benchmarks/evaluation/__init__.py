"""Studies of the evaluation: what scores notice, whether intervals cover, what faster sampling costs in quality."""
