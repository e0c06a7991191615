"""
Seals what must not lie readable in storage: addresses of people, webhooks.

AES-256 in Galois/Counter Mode. A sealed text is ``v1.KEY-ID.`` and base64url of nonce and ciphertext; it opens
only for the owner it was sealed for, so nobody can move it into another document. Of several keys the first seals
and all open: to rotate, put a new one in front, and drop the old one when nothing is sealed with it any more.
"""

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping

from shared.errors import ConfigurationError, InvalidPayloadError

SETTING = "ENDPOINT_KEYS"
KEY_BYTES = 32
NONCE_BYTES = 12
FORM = "v1"
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")
_HOW = (
    f"write ID:KEY, in which KEY is {KEY_BYTES} random bytes in base64; this makes one: "
    'echo "k1:$(openssl rand -base64 32)"'
)


def parse_keys(setting: str) -> Mapping[str, bytes]:
    """
    Read ``id1:base64,id2:base64``; an empty setting is no keys.

    Raises:
        ConfigurationError: says which key is wrong by its place; shows nothing of it.

    """
    keys: dict[str, bytes] = {}
    for number, part in enumerate((p.strip() for p in setting.split(",")), 1):
        if not part and not setting.strip():
            break
        key_id, _, text = part.partition(":")
        try:
            key = base64.b64decode(text.strip(), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not _KEY_ID.fullmatch(key_id) or len(key) != KEY_BYTES:
            raise ConfigurationError(f"key {number} of {SETTING} cannot be read: {_HOW}")
        if key_id in keys:
            raise ConfigurationError(f"{SETTING} names {key_id} twice: give every key an id of its own")
        keys[key_id] = key
    return keys


class Sealer:
    """
    Seals with the first key and opens with any.

    Raises ConfigurationError when the setting cannot be read.
    """

    def __init__(self, setting: str) -> None:
        self._keys = parse_keys(setting)

    def seal(self, text: str, *owner: str) -> str:
        """
        Seal *text* for *owner*, such as a subscriber and a channel; twice never gives the same.

        Raises:
            ConfigurationError: there is no key; says how to make one.

        """
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if not self._keys:
            raise ConfigurationError(f"{SETTING} is not set, and addresses are stored sealed only: {_HOW}")
        key_id, key = next(iter(self._keys.items()))
        nonce = os.urandom(NONCE_BYTES)
        ciphertext = AESGCM(key).encrypt(nonce, text.encode(), _bound(key_id, owner))
        return f"{FORM}.{key_id}.{base64.urlsafe_b64encode(nonce + ciphertext).decode().rstrip('=')}"

    def open(self, sealed: str, *owner: str) -> str:
        """
        The text that was sealed for *owner*.

        Raises:
            ConfigurationError: the key it was sealed with is not among ours.
            InvalidPayloadError: it is no sealed text, was changed, or was sealed for somebody else.

        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        form, _, rest = sealed.partition(".")
        key_id, _, text = rest.partition(".")
        if form != FORM or not _KEY_ID.fullmatch(key_id):
            raise InvalidPayloadError(f"this is no text sealed in form {FORM}")
        key = self._keys.get(key_id)
        if key is None:
            raise ConfigurationError(f"sealed with key {key_id}, which {SETTING} lacks: put it behind the first one")
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            return AESGCM(key).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], _bound(key_id, owner)).decode()
        except (InvalidTag, ValueError) as e:
            raise InvalidPayloadError("the sealed text was changed, or was sealed for somebody else") from e


def _bound(key_id: str, owner: tuple[str, ...]) -> bytes:
    """What the seal also covers; JSON, because joined names could be cut apart elsewhere."""
    return json.dumps([FORM, key_id, *owner]).encode()
