"""The frame of a page that needs no network; only the scripts that it was written with can run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

# The browser loads nothing, and runs only scripts whose hash is named, whatever text a class name or a config value contains.
POLICY = "default-src 'none'; img-src {images}; style-src 'unsafe-inline'"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title} – raydml</title>
<style>{css}</style>
</head>
<body>{body}{scripts}
</body>
</html>
"""


def html_page(title: str, css: str, body: str, scripts: Sequence[str] = (), images: str = "data:") -> bytes:
    """The page as UTF-8; `title` is escaped, all else is put in as it is; `images`: where pictures may come from."""
    hashes = " ".join(map(script_hash, scripts))
    policy = POLICY.format(images=images) + (f"; script-src {hashes}" if scripts else "")
    tags = "".join(f"\n<script>{script}</script>" for script in scripts)
    return _PAGE.format(policy=policy, title=escape(title), css=css, body=body, scripts=tags).encode()


def script_hash(script: str) -> str:
    """The script's SHA-256 as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
