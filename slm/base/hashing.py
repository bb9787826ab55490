"""One hash for plain data. Fingerprints, schedules, and the keys of kept answers and judgements use the hash."""

import hashlib
import json


def digest(content: object) -> str:
    """SHA-256 of plain data, as 64 hex digits. The order of a mapping's keys makes no difference."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
