"""Event ids and community ids made from the columns they follow from (see sectool.flowids), as SQL macros.

event_uuid(event_start, event_id)     the UUIDv7 of a flow, of which a record holds the last eight bytes
community_text(record columns…)       the community id `1:…`, of which a record holds the first two bytes
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sectool.flowids import ICMP_ANSWERS

if TYPE_CHECKING:
    import uuid

COMMUNITY_COLUMNS = (
    "source_ip_hi, source_ip_lo, source_port, destination_ip_hi, destination_ip_lo, destination_port, transport,"
    " ip_version"
)


def community_of(table: str) -> str:
    """SQL for the community id of the rows of `table` (its alias), which has the columns of flow_records."""
    return f"community_text({', '.join(f'{table}.{c}' for c in COMMUNITY_COLUMNS.replace(',', '').split())})"


def low_half(event_id: uuid.UUID) -> int:
    """What flow_records keep of an event id."""
    return event_id.int & (1 << 64) - 1


def _answer(proto: int) -> str:
    """The type that answers the ICMP type `sp`; NULL when nothing does."""
    answers = ICMP_ANSWERS[proto]
    first = min(answers)
    types = range(first, max(answers) + 1)
    return f"[{', '.join(str(answers.get(t, 'NULL')) for t in types)}][sp::INTEGER - {first - 1}]"


_OTHER = f"CASE proto WHEN 1 THEN {_answer(1)} WHEN 58 THEN {_answer(58)} END"
# Ends as hexadecimal, address before port: they sort as their bytes do. A lambda names each value once, where a macro
# would copy the whole expression into every place that needs it.
_ENDS = (
    "[address_hex(sh, sl, version) || lpad(to_hex(sp), 4, '0'),"
    f" address_hex(dh, dl, version) || lpad(to_hex(coalesce({_OTHER}, dp)), 4, '0')]"
)
_ORDERED = f"CASE WHEN proto IN (1, 58) AND ({_OTHER}) IS NULL THEN ends ELSE list_sort(ends) END"
_DATA = "'0000' || e[1][:-5] || e[2][:-5] || lpad(to_hex(proto), 2, '0') || '00' || e[1][-4:] || e[2][-4:]"

MACROS = (
    "CREATE MACRO event_uuid(began, low) AS (((epoch_us(began) // 1000)::UHUGEINT << 80)"
    " | ((28672 | (epoch_us(began) % 1000 * 4096 // 1000))::UHUGEINT << 64) | low)::UUID",
    "CREATE MACRO address_hex(hi, lo, version) AS CASE WHEN version = 4 THEN lpad(to_hex(lo & 4294967295), 8, '0')"
    " ELSE replace(((hi::UHUGEINT << 64) | lo)::UUID::VARCHAR, '-', '') END",
    "CREATE MACRO community_text(sh, sl, sp, dh, dl, dp, proto, version) AS"
    f" list_transform([{_ENDS}], lambda ends: list_transform([{_ORDERED}], lambda e:"
    f" '1:' || to_base64(unhex(sha1(unhex({_DATA})))))[1])[1]",
)
