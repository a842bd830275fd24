"""Video files, frame folders and contact sheets: the only place that speaks uint8 `F H W C`."""
