"""The studies behind this repository's documents; not a part of the package."""
