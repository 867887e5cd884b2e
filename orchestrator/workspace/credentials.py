"""Mask passwords and keys of addresses in everything that is shown or stored.

Addresses hold secrets, as `http://USER:PASSWORD@host` or `s3://bucket?secret=...` does, and
libraries repeat them in errors. Typed addresses are not always valid (a key may contain a slash),
so this searches plain text, and masks too much rather than too little.
"""

from __future__ import annotations

import re

MASK = "***"

# Everything up to the last @ of the host part, or of the whole word if a password may contain a
# slash; `host:8080/` is not a user with a password. The limit of 1,000 characters per password
# keeps the search fast: without it, a word of many addresses would take hours.
_USER = re.compile(r"(?<=://)(?:[^\s/?#]*|[^\s/?#:@]*:(?!\d{1,5}[/?#])\S{0,1000})@")
_SECRET_NAMES = (
    "key|pass|passwd|password|pwd|secret|token|credential|credentials|sig|signature|sas|apikey|auth"
)
_QUERY = re.compile(
    rf"([?&;](?:[\w.-]*[_.-])?(?:{_SECRET_NAMES})=)[^\s&;#'\"]+", flags=re.IGNORECASE
)


def mask_secrets(text: str) -> str:
    """Return a text with the users, passwords and keys of its addresses replaced by `***`."""
    return _QUERY.sub(rf"\g<1>{MASK}", _USER.sub(f"{MASK}@", text))


def has_secret(address: str) -> bool:
    """Return whether an address holds a password or a key; a user name alone does not count."""
    user = _USER.search(address)
    return bool(user and ":" in user[0].rstrip("@")) or _QUERY.search(address) is not None


def strip_credentials(address: str) -> str:
    """Return an address without user and password, and with masked keys, as a public link."""
    return _QUERY.sub(rf"\g<1>{MASK}", _USER.sub("", address))
