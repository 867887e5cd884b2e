"""Keeps passwords and keys that stand in addresses out of everything that is shown or stored.

An address such as `http://USER:PASSWORD@host` or `s3://bucket?secret=...` holds a secret, and
libraries repeat the whole address in their errors. What people type is not always a valid address
(a key with a slash in it, for example), so this works on texts, and hides too much
rather than too little.
"""

from __future__ import annotations

import re

MASK = "***"

# All up to the last @ of the host's part, or of the whole word where a password may go on behind a
# slash; `host:8080/` is no user with a password.
# No password has more than 1,000 characters; without a limit, a text of many addresses in one word
# would take hours.
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
    """Tell whether an address holds a password or a key; a user's name alone is none."""
    user = _USER.search(address)
    return bool(user and ":" in user[0].rstrip("@")) or _QUERY.search(address) is not None


def strip_credentials(address: str) -> str:
    """Return an address without its user and password, as a link that others may see."""
    return _QUERY.sub(rf"\g<1>{MASK}", _USER.sub("", address))
