"""Backups of images' snapshots in S3 or a folder: full ones and increments, in parts with checksums."""
