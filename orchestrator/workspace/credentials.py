"""Mask passwords, keys and tokens in everything that is shown or stored.

Addresses hold secrets, as `http://USER:PASSWORD@host` or `s3://bucket?secret=...` does, and so do
environment variables such as `HF_TOKEN`; libraries repeat both in errors. Typed addresses are not
always valid (a key may contain a slash), so this searches plain text, and masks too much rather
than too little.
"""

from __future__ import annotations

import os
import re

MASK = "***"
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "APIKEY")
"""An environment variable holds a secret if one of these is a part of its name."""
_WORDS_OF_PATHS = ("PATH", "FILE", "DIR")
_SHORTEST_SECRET = 8  # characters; shorter values are words such as `true`

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
_ASSIGNMENT = re.compile(
    rf"(?<!\w)((?:[A-Z0-9]+_)*(?:{'|'.join(SECRET_WORDS)})(?:_[A-Z0-9]+)*=)[^\s,;'\"\]]+"
)


def mask_secrets(text: str) -> str:
    """Return a text with `***` in the place of secrets.

    Those are users, passwords and keys of addresses, values assigned to names such as `HF_TOKEN`,
    and the values of such environment variables of this process.
    """
    for value in sorted(_secrets_of_the_environment(), key=len, reverse=True):
        text = text.replace(value, MASK)
    text = _USER.sub(f"{MASK}@", text)
    for pattern in (_QUERY, _ASSIGNMENT):
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return text


def is_secret_name(name: str) -> bool:
    """Return whether an environment variable of this name holds a secret itself, not its file."""
    parts = name.upper().split("_")
    return not set(SECRET_WORDS).isdisjoint(parts) and parts[-1] not in _WORDS_OF_PATHS


def _secrets_of_the_environment() -> set[str]:
    found = {value for name, value in os.environ.items() if is_secret_name(name)}
    return {value for value in found if len(value) >= _SHORTEST_SECRET}


def has_secret(address: str) -> bool:
    """Return whether an address holds a password or a key; a user name alone does not count."""
    user = _USER.search(address)
    return bool(user and ":" in user[0].rstrip("@")) or _QUERY.search(address) is not None


def strip_credentials(address: str) -> str:
    """Return an address without user and password, and with masked keys, as a public link."""
    return _QUERY.sub(rf"\g<1>{MASK}", _USER.sub("", address))
