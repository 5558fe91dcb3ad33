"""Identifier rules: named, versioned functions `str -> str | None`, so that both sides of a join write ids alike.

A rule never changes once it is released; a better one gets the next number. None means refused: the value is invalid.
Every rule is idempotent, never returns "" and never raises, whatever the text. A doubtful value is refused, because a
refusal is counted and seen, while two customers made one are not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from datetime import date
from functools import partial

Rule = Callable[[str], str | None]

SURROGATE = re.compile("[\ud800-\udfff]")
# What every rule reads past: soft hyphen, byte order mark, zero-width and direction marks. Copied text is full of them.
HIDDEN = (0xAD, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), *range(0x2066, 0x206A))
DASHES = (*range(0x2010, 0x2016), 0x2212)  # hyphens, en and em dash, minus sign
UNSEEN = dict.fromkeys(HIDDEN)
PLAIN = UNSEEN | dict.fromkeys(DASHES, "-")


def _text(value: str) -> str | None:
    """text/1: no invisible marks, NFKC, case folded, NFKC again (folding can undo it), white space trimmed and made
    one space."""
    if value.isascii():  # NFKC leaves it as it is, and folding is lower case
        return " ".join(value.lower().split()) or None
    if SURROGATE.search(value):  # half a character: it has no UTF-8
        return None
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", value.translate(UNSEEN)).casefold())
    return " ".join(folded.split()) or None


def _email(value: str) -> str | None:
    """email/1: text/1 with one "@" between two parts and no white space. Dots and "+tags" stay: providers differ."""
    text = _text(value)
    if text is None or " " in text:
        return None
    local, _, domain = text.partition("@")
    return text if local and domain and "@" not in domain else None


def _email_untagged(value: str) -> str | None:
    """email-untagged/1: email/1 without the "+tag" of the local part. A local part that is only a tag is refused."""
    text = _email(value)
    if text is None or "+" not in text:
        return text
    local, _, domain = text.partition("@")
    kept = local.partition("+")[0]
    return f"{kept}@{domain}" if kept else None


def _email_gmail(value: str) -> str | None:
    """email-gmail/1: email-untagged/1; for gmail.com and googlemail.com, no dots in the local part, and gmail.com.

    Google delivers all these spellings to one mailbox. Addresses elsewhere, own domains at Google too, keep their dots.
    """
    text = _email_untagged(value)
    if text is None or not text.endswith(("@gmail.com", "@googlemail.com")):
        return text
    return _email(text.partition("@")[0].replace(".", "") + "@gmail.com")  # again: an accent may meet its letter


def _plain(value: str) -> str:
    """NFKC, every dash as "-", no invisible marks, no white space at the ends.

    Character by character: NFKC of a whole text takes time quadratic in a run of accents, which no plain rule accepts.
    """
    if value.isascii():
        return value.strip()
    return "".join([unicodedata.normalize("NFKC", character) for character in value]).translate(PLAIN).strip()


BETWEEN_DIGITS = str.maketrans("", "", " .-/")


def _digits(value: str) -> str | None:
    """digits/1: ASCII digits, leading zeros kept; spaces, dots, dashes and slashes between the digits are dropped.

    Refused: letters, digits of other scripts, tabs and line breaks, and a separator at an end (a sign, a cut decimal).
    """
    text = _plain(value)
    if not text.isascii() or not (text[:1].isdigit() and text[-1].isdigit()):
        return None
    joined = text.translate(BETWEEN_DIGITS)
    return joined if joined.isdigit() else None


# Midnight, as databases and spreadsheets write a date that they hold as a timestamp; UTC is the only zone.
MIDNIGHT = r"(?:[T ]0?0:00(?::00(?:\.0+)?)?(?:Z|[+-]00(?::?00)?)?)?"
YEAR_FIRST = re.compile(r"([0-9]{4})([-/.]|(?=[0-9]{4}))([0-9]{1,2})\2([0-9]{1,2})" + MIDNIGHT)  # bare: all four digits
YEAR_LAST = re.compile(r"([0-9]{1,2})([-/.])([0-9]{1,2})\2([0-9]{4})" + MIDNIGHT)


def _date(value: str, *, day_first: bool | None = None) -> str | None:
    """date/1: a real date, year first, as ISO 8601; with `day_first`, date-dmy/1 (True) or date-mdy/1 (False).

    Year first is YYYY-MM-DD, YYYY/MM/DD, YYYY.MM.DD (one digit will do for month and day) and YYYYMMDD. A time is
    accepted only if it is midnight: any other may be another day elsewhere. The other two rules read all this as well,
    and their own order with separators. Eight bare digits are year first everywhere: read so, a DDMMYYYY or MMDDYYYY of
    a year from 1300 has no such month, hence is refused, never misread. Two-digit years are refused.
    """
    text = _plain(value)
    if found := YEAR_FIRST.fullmatch(text):
        year, _, month, day = found.groups()
    elif day_first is not None and (found := YEAR_LAST.fullmatch(text)):
        first, _, second, year = found.groups()
        day, month = (first, second) if day_first else (second, first)
    else:
        return None
    try:
        return date(int(year), int(month), int(day)).isoformat()
    except ValueError:  # no such day, such as 31 February
        return None


SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def _sha256(value: str) -> str | None:
    """sha256/1: 64 hexadecimal digits in lower case, for ids that were hashed before; from what, it cannot see."""
    text = _plain(value)
    return text.lower() if SHA256.fullmatch(text) else None


# What people write between the digits of a number; the long vowel mark is Japan's dash.
BETWEEN_NUMBERS = str.maketrans("", "", " .-/()[]~\u30fc")
NUMBER = re.compile(r"(\+?)(\d{3,30})")


def _phone(value: str, region: str | None = None) -> str | None:
    """phone/1: E.164 of an international number, "+" first; with `region`, phone-XX/1 reads XX's national numbers too.

    - Only "+" says international everywhere: 00 is dialled so in most countries, 011 in North America, 010 in Japan. A
      region knows its own.
    - Accepted is a number of a possible length (area code included), not only one in a range now assigned: ranges
      change with most releases of the `phonenumbers` metadata, lengths seldom do. From release 8.13.0 to 9.0.43,
      validity changed for 1.9 % of 29,340 random international numbers, possibility for 0.4 %, the E.164 text for
      none. National numbers depend on the metadata for their prefixes as well: use one release on both sides.
    - An extension is refused, as is any letter: without it, all colleagues behind a switchboard would be one customer.
    - Words, commas, line breaks or a second "+" are refused: what a library finds in free text is not stable.

    Decimal digits of every script are read, as `phonenumbers` does.
    """
    import phonenumbers

    found = NUMBER.fullmatch(_plain(value).translate(BETWEEN_NUMBERS))
    if found is None:
        return None
    digits = "".join([str(int(digit)) for digit in found[2]])

    def e164(text: str) -> str | None:
        try:
            number = phonenumbers.parse(text, region)  # without a region, only "+" is read
        except phonenumbers.NumberParseException:
            return None
        if phonenumbers.is_possible_number_with_reason(number) != phonenumbers.ValidationResult.IS_POSSIBLE:
            return None
        return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)

    text = found[1] + digits
    once = e164(text)
    # A prefix that was taken off may leave one more (+49 0 0 30): what does not read back as itself is refused.
    return once if once is None or once == text or e164(once) == once else None


RULES: dict[str, Rule] = {
    "text/1": _text,
    "email/1": _email,
    "email-untagged/1": _email_untagged,
    "email-gmail/1": _email_gmail,
    "phone/1": _phone,
    "date/1": _date,
    "date-dmy/1": partial(_date, day_first=True),
    "date-mdy/1": partial(_date, day_first=False),
    "digits/1": _digits,
    "sha256/1": _sha256,
}
# For people; XX stands for a region of ISO 3166, such as DE.
KNOWN: tuple[str, ...] = (*RULES, "phone-XX/1")


def rule(name: str) -> Rule:
    """The rule of this name, a function that can be pickled (for workers).

    Raises:
        ValueError: unknown rule, or a region that `phonenumbers` does not know; the text lists the known forms.
    """
    if name in RULES:
        return RULES[name]
    if found := re.fullmatch(r"phone-([A-Z]{2})/1", name):
        from phonenumbers import SUPPORTED_REGIONS

        if found[1] in SUPPORTED_REGIONS:
            return partial(_phone, region=found[1])
    raise ValueError(f"unknown rule {name!r}; known: {', '.join(KNOWN)} (XX: a region such as DE)")
