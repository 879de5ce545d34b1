"""What the processes of a server take."""

from __future__ import annotations

from pathlib import Path

from merged_lora.bench.server import Server


def resident_bytes(server: Server) -> int:
    """Resident memory of all processes of a server, in bytes."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            lines = stat.with_name("status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        if int(fields[2]) == server.pid:  # the process group
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    return total
