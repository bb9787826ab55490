"""One hash for plain data, however it is made: fingerprints, keys of kept answers and judgements, schedules."""

import hashlib
import json


def digest(content: object) -> str:
    """SHA-256 of plain data, as 64 hex digits. The order of a mapping's keys makes no difference."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
