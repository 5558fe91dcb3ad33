"""Made-up ids for a rehearsal: every party makes its own tables from a shared seed, with a known overlap.

Nothing here is secret, and nothing is a customer's. Phone numbers are built on the example numbers of the installed
`phonenumbers`: as for the rule itself, both sides use one release of it.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from datetime import date, timedelta
from functools import lru_cache
from math import gcd

from parties import agreement
from psi import rules

SPELLINGS = 4
NUMBERS = 10**12  # how many specimens a rule has that sets no narrower limit
FIRST_DAY, LAST_DAY = date(1900, 1, 1), date(2099, 12, 31)
REGIONS = ("DE", "FR", "GB", "JP", "US")  # for phone/1, which takes numbers of any country


def specimen(rule: str, number: int, seed: bytes, spelling: int = 0) -> str:
    """A value that `rule` accepts, distinct for distinct numbers once it is canonical; another one for another seed.

    `spelling` (modulo 4) changes case, white space, separators or tags, never the canonical value. `number` is below
    10**12; for date rules below 73,049 (the days of 1900 to 2099, in an order that depends on the seed, so two seeds
    do share values); for phone rules below 10**5 to 10**7, by region (phone/1: 5 regions).

    Raises:
        ValueError: unknown rule, a rule without specimens, or no such number.
    """
    if not 0 <= number < capacity(rule):
        raise ValueError(f"{rule} has the specimens 0 to {capacity(rule) - 1:,}, not {number:,}")
    return MAKERS[_family(rule)](rule, number, seed, spelling % SPELLINGS)


def capacity(rule: str) -> int:
    """How many distinct specimens a rule has. Raises ValueError: unknown rule, or one without specimens."""
    family = _family(rule)
    if family == "date":
        return (LAST_DAY - FIRST_DAY).days + 1
    if family == "phone":
        return min(_base(region)[2] for region in _regions(rule)) * len(_regions(rule))
    return NUMBERS


def _family(rule: str) -> str:
    rules.rule(rule)
    family = rule.partition("/")[0].partition("-")[0]
    if family not in MAKERS:
        raise ValueError(f"{rule} has no specimens")
    return family


def _tag(seed: bytes, number: int) -> str:
    """64 hexadecimal digits."""
    return hashlib.sha256(b"colonnade/psi/specimen/1" + number.to_bytes(8, "big") + seed).hexdigest()


@lru_cache(maxsize=64)
def _affine(seed: bytes, size: int) -> tuple[int, int]:
    drawn = hashlib.sha512(b"colonnade/psi/specimen/order/1" + seed).digest()
    factor = int.from_bytes(drawn[:32], "big") % size
    while gcd(factor, size) != 1:
        factor += 1
    return factor, int.from_bytes(drawn[32:], "big") % size


def _scattered(seed: bytes, number: int, size: int) -> int:
    """A permutation of the numbers below `size`."""
    factor, shift = _affine(seed, size)
    return (factor * number + shift) % size


def _text(rule: str, number: int, seed: bytes, spelling: int) -> str:
    plain = f"Änne Groß {number} {_tag(seed, number)[:12]}"
    return (
        plain,
        plain.upper(),  # ß becomes SS
        f"  {plain}\t".replace(" ", " \u00a0"),  # no-break spaces
        unicodedata.normalize("NFD", plain.lower()),  # the umlaut as letter and dots
    )[spelling]


def _email(rule: str, number: int, seed: bytes, spelling: int) -> str:
    local, domain = f"specimen{number}x{_tag(seed, number)[:12]}", "example.org"
    if rule == "email-gmail/1":
        domain = ("gmail.com", "googlemail.com")[spelling % 2]
        local = local if spelling == 0 else f"{local[:spelling]}.{local[spelling:]}"
    if rule != "email/1":
        local += ("", "+News", "+a+b", "+x.y")[spelling]
    plain = f"{local}@{domain}"
    return (plain, plain.upper(), f" {plain}\t", plain.replace("@", "\uff20"))[spelling]


def _digits(rule: str, number: int, seed: bytes, spelling: int) -> str:
    plain = f"{_scattered(seed, number, NUMBERS):012d}"
    parts = plain[:4], plain[4:8], plain[8:]
    return (plain, " ".join(parts), "-".join(parts), f" {'.'.join(parts)} ")[spelling]


def _date(rule: str, number: int, seed: bytes, spelling: int) -> str:
    day = FIRST_DAY + timedelta(_scattered(seed, number, capacity(rule)))
    own = {
        "date-dmy/1": f"{day.day}.{day.month}.{day.year}",
        "date-mdy/1": f"{day.month}/{day.day}/{day.year}",
    }.get(rule, f"{day.year}/{day.month}/{day.day}")
    return (day.isoformat(), own, f"{day:%Y%m%d} ", f"{day.isoformat()}T00:00:00Z")[spelling]


def _sha256(rule: str, number: int, seed: bytes, spelling: int) -> str:
    plain = _tag(seed, number)
    return (plain, plain.upper(), f" {plain}\t", plain[:32].upper() + plain[32:])[spelling]


def _phone(rule: str, number: int, seed: bytes, spelling: int) -> str:
    regions = _regions(rule)
    region, number = regions[number % len(regions)], number // len(regions)
    code, base, size, trunk = _base(region)
    places = len(str(size)) - 1
    national = base[: len(base) - places] + f"{_scattered(seed, number, size):0{places}d}"
    area, line = national[:2], national[2:]
    plain = f"+{code}{national}"
    if spelling == 3 and rule != "phone/1" and rules.rule(rule)(f"{trunk}{area} {line}") == plain:
        return f"{trunk}{area} {line}"  # as it is dialled at home
    grouped = f"+{code} ({area}) {line[:2]}-{line[2:]}"
    return (plain, grouped, f"+{code}.{area}.{line}\t", f" +{code} {area}/{line}")[spelling]


def _regions(rule: str) -> tuple[str, ...]:
    return REGIONS if rule == "phone/1" else (rule[len("phone-") : -len("/1")],)


@lru_cache(maxsize=512)
def _base(region: str) -> tuple[int, str, int, str]:
    """Country code, a national number, how many there are that differ in its last digits, and the trunk prefix."""
    import phonenumbers as known

    code = known.country_code_for_region(region)
    examples = (known.example_number(region), known.example_number_for_type(region, known.PhoneNumberType.MOBILE))
    base = max((known.national_significant_number(one) for one in examples if one), key=len)
    while len(base) < 6 and known.is_possible_number(known.parse(f"+{code}{base}0")):  # an island's four digits
        base += "0"
    return code, base, 10 ** min(7, max(5, len(base) - 3)), known.ndd_prefix_for_region(region, True) or ""


Maker = Callable[[str, int, bytes, int], str]
MAKERS: dict[str, Maker] = {
    "text": _text,
    "email": _email,
    "digits": _digits,
    "date": _date,
    "sha256": _sha256,
    "phone": _phone,
}


def rehearsal_tables(
    agreed: agreement.Identifiers, seed: bytes, party: int, parties: int, common: int, own: int
) -> dict[str, list[str]]:
    """The table of party number `party` (from 0) of `parties`, by field name: `common` rows that all have and `own`
    rows that only it has, in an order and in spellings of its own. Exactly `common` rows match.

    The common rows take turns between the keys of a cascade: each agrees only under its key (as far as that can be:
    where an earlier key is part of it, they agree under that one already), because at one party, turn by turn, its
    other fields are empty or another's. A row of one's own shares one field with a common row, unless that field is a
    key by itself.

    Raises:
        ValueError: more rows than a rule has specimens, or no such party.
    """
    if not 0 <= party < parties or common < 0 or own < 0:
        raise ValueError("the party's number is from 0 to below that of the parties, and rows are not negative")
    nobody = common + parties * own  # numbers from here on stand for values that no other row has
    short = min(agreed.fields.values(), key=capacity)
    if nobody + common > capacity(short):
        raise ValueError(f"{short} has {capacity(short):,} specimens, this rehearsal needs {nobody + common:,}")
    turns, shared = _turns(agreed), [name for name in agreed.fields if (name,) not in agreed.cascade]

    def whose(name: str, row: int) -> int | None:
        """The number of the specimen in a row's field; None for an empty one."""
        if row >= common:
            borrows = common and shared and shared[row % len(shared)] == name
            return row % common if borrows else row
        turn, rest = row % len(turns), row // len(turns)
        if name in agreed.cascade[turns[turn]] or rest % parties != party:
            return row
        return None if rest // parties % 2 else nobody + row

    start = common + party * own
    order = hashlib.sha256(b"order" + party.to_bytes(4, "big") + seed).digest()
    rows = sorted((*range(common), *range(start, start + own)), key=lambda row: _tag(order, row))
    table = {}
    for name, rule in agreed.fields.items():
        secret = hashlib.sha256(b"field" + name.encode() + b"\0" + seed).digest()
        numbers = [whose(name, row) for row in rows]
        table[name] = [
            "" if number is None else specimen(rule, number, secret, party + row)
            for number, row in zip(numbers, rows, strict=True)
        ]
    return table


def rehearsal_steps(agreed: agreement.Identifiers, common: int) -> list[int]:
    """How many of the `common` rows match under each key of the cascade."""
    turns = _turns(agreed)
    steps = [0] * len(agreed.cascade)
    for turn, key in enumerate(turns):
        steps[key] = len(range(turn, common, len(turns)))
    return steps


def _turns(agreed: agreement.Identifiers) -> list[int]:
    """The keys under which a row can agree that agrees under none before: no earlier key is part of them."""
    keys = [set(key) for key in agreed.cascade]
    return [number for number, key in enumerate(keys) if not any(earlier <= key for earlier in keys[:number])]
