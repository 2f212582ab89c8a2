"""Files by path or URI, local or in object storage."""

from pipeline.storage.folder import Folder, home, read_file

__all__ = ["Folder", "home", "read_file"]
