"""Video files, frame folders and contact sheets; pixels are uint8 `F H W C`, in this package only."""
