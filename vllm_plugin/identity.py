"""Who a merge is, inside vLLM: one name, one path and one id, all made from its digest.

vLLM keys its prefix cache by name and path, its slots by id, and metric labels by name.  A digest of rule,
weights and the content of every source in all three means: other content, other identity.  No text that a
client sent stands in the name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import parse_qs, urlencode

from merged_lora.errors import SpecError
from merged_lora.spec import MergeSpec, parse

SCHEME = "merged-lora:"
FIRST_ID = 1 << 30  # vLLM counts its own ids up from 1, and keeps ids in 32 signed bits
NUMBER_TAKEN = "this merge's id is taken by another merge; change a weight in its last digit"
_CONTENT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class MergeIdentity:
    """A merge of sources with known content.

    contents: content digest of each source of the spec, in its order.
    """

    spec: MergeSpec
    contents: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal characters that stand for this merge and no other."""
        return self.spec.digest(dict(zip(self.spec.names, self.contents, strict=True)))

    @property
    def name(self) -> str:
        """The adapter name under which vLLM knows it."""
        return SCHEME + self.digest

    @property
    def number(self) -> int:
        """The adapter id: the same in every process, from 2^30 up to below 2^31."""
        return FIRST_ID + int(self.digest, 16) % FIRST_ID

    @property
    def path(self) -> str:
        """A URI that holds everything a worker needs besides the sources' content."""
        return f"{self.name}?{urlencode({'spec': str(self.spec), 'contents': ','.join(self.contents)})}"

    @classmethod
    def from_path(cls, path: str) -> MergeIdentity:
        """The merge that such a URI means; raises SpecError where it is not one."""
        name, _, query = path.partition("?")
        fields = parse_qs(query)
        if not is_merge_path(path) or set(fields) != {"spec", "contents"}:
            raise SpecError(f"{path[:64]!r} is not the path of a merge")
        spec = parse(fields["spec"][0])
        contents = tuple(fields["contents"][0].split(","))
        if len(contents) != len(spec.names) or not all(map(_CONTENT.fullmatch, contents)):
            raise SpecError(f"{path[:64]!r} does not name the content of every source")
        identity = cls(spec, contents)
        if identity.name != name:
            raise SpecError(f"{path[:64]!r} has a digest that does not match its content")
        return identity


def is_merge_path(path: str) -> bool:
    """Whether an adapter's path names a merge."""
    return path.startswith(SCHEME)
