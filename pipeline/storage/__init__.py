"""Files by path or URI, local or in object storage."""

from pipeline.storage.folder import Folder, disk_full_as_error, home, read_file

__all__ = ["Folder", "disk_full_as_error", "home", "read_file"]
