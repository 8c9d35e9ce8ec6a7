"""``fedmpi bench``: speeds as ratios to something measured in the same run, against the targets they must reach."""
