"""The curve code of both suites against RFC 9380, RFC 7748, Wycheproof and plain integers, and the lists of tokens."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from gmpy2 import mpz
from hypothesis import given
from hypothesis import strategies as st

from psi import curve25519, group, hash_to_curve, p256

VECTORS = Path(__file__).resolve().parents[2] / "shared" / "vectors"
P, J = 2**255 - 19, 486662
P256_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
P256_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
P256_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
X25519 = group.suite("curve25519_XMD:SHA-512_ELL2_RO_")
NIST = group.suite("P256_XMD:SHA-256_SSWU_RO_")
both_suites = pytest.mark.parametrize("suite", [X25519, NIST], ids=["curve25519", "P256"])
RFC_DST = b"QUUX-V01-CS02-with-"


def vectors(name: str) -> dict:
    if not (VECTORS / name).is_file():
        pytest.skip(f"the vectors {name} are not on this machine")
    return json.loads((VECTORS / name).read_text())


def rows(*points: bytes | int | str) -> np.ndarray:
    """Points given as bytes, hex or integers, as an array."""
    raw = [
        p.to_bytes(32, "little") if isinstance(p, int) else bytes.fromhex(p) if isinstance(p, str) else p
        for p in points
    ]
    return np.frombuffer(b"".join(raw), dtype=np.uint8).reshape(-1, 32)


def big(*points: int) -> np.ndarray:
    """Points of P-256 given as integers, as an array."""
    return rows(*(p.to_bytes(32, "big") for p in points))


def honest(n: int, suite: group.Suite = X25519) -> np.ndarray:
    return suite.mask(suite.hash_to_points([f"id {i}".encode() for i in range(n)]), bytes(range(32)))


# An oracle in plain integers: the curve y^2 = x^3 + J x^2 + x, None for the identity.


def right_side(x: int) -> int:
    return (x**3 + J * x**2 + x) % P


def is_square(v: int) -> bool:
    return pow(v, (P - 1) // 2, P) == 1


def add(a, b, p=P, a2=J, a4=1):
    """On y^2 = x^3 + a2 x^2 + a4 x + .. over p; this curve, or another."""
    if a is None or b is None:
        return b if a is None else a
    (x0, y0), (x1, y1) = a, b
    if x0 == x1 and (y0 + y1) % p == 0:
        return None
    rise, run = (3 * x0 * x0 + 2 * a2 * x0 + a4, 2 * y0) if a == b else (y1 - y0, x1 - x0)
    slope = rise * pow(run, -1, p)
    x = (slope * slope - a2 - x0 - x1) % p
    return x, (slope * (x0 - x) - y0) % p


def times(k: int, point, *curve: int):
    out = None
    for bit in bin(k)[2:]:
        out = add(out, out, *curve)
        out = add(out, point, *curve) if bit == "1" else out
    return out


P256_CURVE = (P256_P, 0, -3)


def p256_side(x: int) -> int:
    return (x**3 - 3 * x + P256_B) % P256_P


def p256_y(x: int) -> int | None:
    """The even y of an x-coordinate of P-256; None off the curve."""
    y = pow(p256_side(x), (P256_P + 1) // 4, P256_P)
    return (y if y % 2 == 0 else P256_P - y) if y * y % P256_P == p256_side(x) else None


def sswu(u: int) -> tuple[int, int]:
    """RFC 9380, section 6.6.2, word for word, with Z = -10 of section 8.2."""
    p, a, z = P256_P, -3, -10
    tv1 = (z * z * u**4 + z * u * u) % p
    x = -P256_B * pow(a, -1, p) * (1 + pow(tv1, -1, p)) % p if tv1 else P256_B * pow(z * a, -1, p) % p
    if pow(p256_side(x), (p - 1) // 2, p) not in (0, 1):
        x = z * u * u * x % p
    y = p256_y(x)
    assert y is not None
    return x, y if u % 2 == 0 else (p - y) % p


def elligator2(u: int) -> tuple[int, int]:
    """RFC 9380, section 6.7.1, word for word."""
    x = -J * pow(1 + 2 * u * u, -1, P) % P
    odd = 1
    if not is_square(right_side(x)):
        x, odd = (-x - J) % P, 0
    y = pow(right_side(x), (P + 3) // 8, P)
    if y * y % P != right_side(x):
        y = y * pow(2, (P - 1) // 4, P) % P
    assert y * y % P == right_side(x)
    return x, y if y % 2 == odd else P - y


def doubled_x(x: int) -> int | None:
    """The x-coordinate of twice a point of the curve or of its twist; None for the identity."""
    below = 4 * x * (x * x + J * x + 1) % P
    return (x * x - 1) ** 2 * pow(below, -1, P) % P if below else None


def twist_point() -> int:
    return next(x for x in range(2, 100) if not is_square(right_side(x)))


# --- RFC 9380


TYPED_EXPAND = [
    ("sha256", "abc", 32, "d8ccab23b5985ccea865c6c97b6e5b8350e794e603b4b97902f53a8a0d605615"),
    ("sha512", "abc", 32, "0da749f12fbe5483eb066a5f595055679b976e93abe9be6f0f6318bce7aca8dc"),
]
TYPED_RO = [
    (
        "",
        "005fe8a7b8fef0a16c105e6cadf5a6740b3365e18692a9c05bfbb4d97f645a6a",
        "1347edbec6a2b5d8c02e058819819bee177077c9d10a4ce165aab0fd0252261a",
        "2de3780abb67e861289f5749d16d3e217ffa722192d16bbd9d1bfb9d112b98c0",
        "3b5dc2a498941a1033d176567d457845637554a2fe7a3507d21abd1c1bd6e878",
    ),
    (
        "abc",
        "49bed021c7a3748f09fa8cdfcac044089f7829d3531066ac9e74e0994e05bc7d",
        "5c36525b663e63389d886105cee7ed712325d5a97e60e140aba7e2ce5ae851b6",
        "2b4419f1f2d48f5872de692b0aca72cc7b0a60915dd70bde432e826b6abc526d",
        "1b8235f255a268f0a6fa8763e97eb3d22d149343d495da1160eff9703f2d07dd",
    ),
]


@pytest.mark.parametrize(("name", "message", "length", "expected"), TYPED_EXPAND)
def test_expand_message_typed(name, message, length, expected):
    dst = {"sha256": b"QUUX-V01-CS02-with-expander-SHA256-128", "sha512": b"QUUX-V01-CS02-with-expander-SHA512-256"}
    assert hash_to_curve.expand_message_xmd(message.encode(), dst[name], length, name).hex() == expected


@pytest.mark.parametrize("name", ["SHA256_38", "SHA256_256", "SHA512_38"])
def test_expand_message(name):
    suite = vectors(f"rfc9380/expand_message_xmd_{name}.json")
    for t in suite["tests"]:
        length = int(t["len_in_bytes"], 16)
        got = hash_to_curve.expand_message_xmd(t["msg"].encode(), suite["DST"].encode(), length, suite["hash"].lower())
        assert got.hex() == t["uniform_bytes"]


@pytest.mark.parametrize(("length", "dst"), [(0, b"d"), (-1, b"d"), (255 * 64 + 1, b"d"), (65536, b"d"), (32, b"")])
def test_expand_message_refuses_what_the_rfc_refuses(length, dst):
    with pytest.raises(ValueError, match="cannot expand"):
        hash_to_curve.expand_message_xmd(b"", dst, length, "sha512")


def test_expand_message_longest_and_oversized_tag():
    longest = hash_to_curve.expand_message_xmd(b"", b"d", 255 * 64, "sha512")
    assert len(longest) == 255 * 64
    assert len(hash_to_curve.expand_message_xmd(b"", b"d", 255 * 32, "sha256")) == 255 * 32
    hashed = hashlib.sha512(b"H2C-OVERSIZE-DST-" + b"d" * 256).digest()
    whole, cut, longest_tag = (
        hash_to_curve.expand_message_xmd(b"m", dst, 99, "sha512") for dst in (b"d" * 256, hashed, b"d" * 255)
    )
    assert whole == cut != longest_tag


@pytest.mark.parametrize(("message", "u0", "u1", "x", "y"), TYPED_RO)
def test_hash_to_curve_typed(message, u0, u1, x, y):
    dst = RFC_DST + curve25519.NAME.encode()
    assert curve25519.fields(message.encode(), dst) == [int(u0, 16), int(u1, 16)]
    (point,) = curve25519.hash_to_curve([message.encode()], dst)
    assert times(8, tuple(map(int, point))) == (int(x, 16), int(y, 16))


def hexes(point: dict) -> tuple[int, int]:
    return int(point["x"], 16), int(point["y"], 16)


def test_hash_to_curve_ro():
    suite = vectors("rfc9380/curve25519_XMD_SHA-512_ELL2_RO_.json")
    assert suite["ciphersuite"] == curve25519.NAME
    assert len(suite["vectors"]) == 5
    messages = [t["msg"].encode() for t in suite["vectors"]]
    points = curve25519.hash_to_curve(messages, suite["dst"].encode())
    for t, message, point in zip(suite["vectors"], messages, points, strict=True):
        fields = curve25519.fields(message, suite["dst"].encode())
        assert fields == [int(u, 16) for u in t["u"]]
        assert curve25519.map_to_curve(fields) == [hexes(t["Q0"]), hexes(t["Q1"])]
        assert times(8, tuple(map(int, point))) == hexes(t["P"])


def test_encode_to_curve_nu():
    suite = vectors("rfc9380/curve25519_XMD_SHA-512_ELL2_NU_.json")
    assert len(suite["vectors"]) == 5
    for t in suite["vectors"]:
        (u,) = curve25519.fields(t["msg"].encode(), suite["dst"].encode(), 1)
        assert u == int(t["u"][0], 16)
        (point,) = curve25519.map_to_curve([u])
        assert point == hexes(t["Q"])
        assert times(8, tuple(map(int, point))) == hexes(t["P"])


@given(st.one_of(st.integers(0, P - 1), st.sampled_from([0, 1, 2, P - 1, P - 2, pow(2, (P - 1) // 4, P)])))
def test_map_is_the_rfcs_and_on_the_curve(u):
    x, y = map(int, curve25519.map_to_curve([mpz(u)])[0])
    assert (x, y) == elligator2(u)
    assert 0 <= x < P
    assert 0 <= y < P  # u = 0 goes to (0, 0)
    assert y * y % P == right_side(x)


# A session of this version must give these points, and this order for the key 0, for ever.
PINNED = (
    "135394845b6929f3c0662145ccc39d295ff709cc20fe8dbea7ef81ee354c4d3d"
    "50824632098c2387ec156e06e0d391a83954abc09cd6fe662f53f0b90e553b7d"
)
PINNED_ORDER = [2, 6, 1, 5, 7, 4, 0, 3]


def test_the_suite_and_tag_are_fixed():
    assert curve25519.DST == b"Colonnade-PSI-V01-CS01-with-curve25519_XMD:SHA-512_ELL2_RO_"
    assert X25519.hash_to_points([b"", b"abc"]).tobytes().hex() == PINNED


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_a_batch_is_its_messages_one_by_one(messages):
    batch = X25519.hash_to_points(messages)
    assert batch.shape == (len(messages), 32)
    assert batch.dtype == np.uint8
    for message, point in zip(messages, batch, strict=True):
        assert X25519.hash_to_points([message]).tobytes() == point.tobytes()
        a, b = (elligator2(int(u)) for u in curve25519.fields(message))
        assert int.from_bytes(point.tobytes(), "little") == add(a, b)[0]


def integers(points) -> list[tuple[int, int]]:
    return [(int(x), int(y)) for x, y in points]


def test_a_batch_of_any_size_is_its_messages_in_order():
    messages = [str(i).encode() for i in range(2 * hash_to_curve.BATCH + 3)]
    for suite in (X25519, NIST):
        whole = suite.hash_to_points(messages)
        assert len(whole) == len(messages)
        for i in (0, hash_to_curve.BATCH - 1, hash_to_curve.BATCH, 2 * hash_to_curve.BATCH + 2):
            assert suite.hash_to_points([messages[i]]).tobytes() == whole[i].tobytes()


@pytest.mark.parametrize("curve", [(P, J, 1), P256_CURVE], ids=["curve25519", "P256"])
def test_additions_share_a_batch_with_exceptional_ones(curve):
    p = curve[0]
    g, h = (elligator2(7), elligator2(8)) if p == P else (sswu(7), sswu(8))
    minus = (g[0], p - g[1])
    left, right = [g, g, g, h, minus], [h, g, minus, g, minus]
    expected = [add(g, h, *curve), add(g, g, *curve), (0, 0), add(g, h, *curve), add(minus, minus, *curve)]
    if p == P:
        order_two = (0, 0)  # its double is the identity, encoded the same
        left, right = [*left, order_two, order_two], [*right, order_two, g]
        expected += [(0, 0), add(order_two, g)]
    fields = [[(mpz(x), mpz(y)) for x, y in side] for side in (left, right)]
    assert integers(hash_to_curve.add(*fields, *map(mpz, curve))) == expected
    assert hash_to_curve.add([], [], *map(mpz, curve)) == []


def opposite(monkeypatch: pytest.MonkeyPatch, module) -> None:
    """Both fields of a message are mapped to opposite points: odds of 2^-252 made certain."""
    (point,) = module.map_to_curve([mpz(7)])
    monkeypatch.setattr(module, "map_to_curve", lambda us: [point, (point[0], module.P - point[1])])


def test_a_message_that_hashes_to_the_identity_is_encoded_as_zero_and_refused_by_mask(monkeypatch):
    # u and -u map to one point, so equal u double; an opposite pair needs a forged map.
    u = mpz(7)
    monkeypatch.setattr(curve25519, "fields", lambda message, dst: [u, -u % P])
    assert X25519.hash_to_points([b"m"]).tobytes() == rows(times(2, elligator2(7))[0]).tobytes()
    opposite(monkeypatch, curve25519)
    zero = X25519.hash_to_points([b"m"])
    assert not zero.any()
    with pytest.raises(ValueError, match="small order"):
        X25519.mask(zero, X25519.scalar())


def test_a_message_that_hashes_to_the_identity_of_p256_is_refused(monkeypatch):
    opposite(monkeypatch, p256)
    with pytest.raises(ValueError, match="infinity"):
        NIST.hash_to_points([b"m"])


@given(st.sampled_from([P, P256_P]), st.lists(st.one_of(st.just(0), st.integers(0, P - 1)), max_size=8))
def test_inverses(p, values):
    got = hash_to_curve.inverses([mpz(v) for v in values], mpz(p))
    assert got == [pow(v, -1, p) if v else 0 for v in values]


# --- RFC 9380: P-256

NIST_FILES = pytest.mark.parametrize("kind", ["RO", "NU"])
TYPED_P256 = (
    0xAD5342C66A6DD0FF080DF1DA0EA1C04B96E0330DD89406465EEBA11582515009,
    0x8C0F1D43204BD6F6EA70AE8013070A1518B43873BCD850AAFA0A9E220E2EEA5A,
    0x2C15230B26DBC6FC9A37051158C95B79656E17A1A920B11394CA91C44247D3E4,
    0x8A7A74985CC5C776CDFE4B1F19884970453912E9D31528C060BE9AB5C43E8415,
)


def test_hash_to_p256_typed():
    dst = RFC_DST + NIST.name.encode()
    assert p256.fields(b"", dst) == list(TYPED_P256[:2])
    assert integers(p256.hash_to_curve([b""], dst)) == [TYPED_P256[2:]]


@NIST_FILES
def test_hash_to_p256(kind):
    suite = vectors(f"rfc9380/P256_XMD_SHA-256_SSWU_{kind}_.json")
    assert suite["ciphersuite"] == NIST.name.replace("RO", kind)
    assert len(suite["vectors"]) == 5
    for t in suite["vectors"]:
        fields = p256.fields(t["msg"].encode(), suite["dst"].encode(), len(t["u"]))
        assert fields == [int(u, 16) for u in t["u"]]
        mapped = integers(p256.map_to_curve(fields))
        assert mapped == [hexes(t[q]) for q in (("Q0", "Q1") if kind == "RO" else ("Q",))]
        if kind == "NU":
            assert mapped[0] == hexes(t["P"])
    if kind == "RO":
        messages = [t["msg"].encode() for t in suite["vectors"]]
        points = integers(p256.hash_to_curve(messages, suite["dst"].encode()))
        assert points == [hexes(t["P"]) for t in suite["vectors"]]


# u = 0 and u^2 = 1/10 make the fraction of the map infinite.
TENTH = pow(pow(10, -1, P256_P), (P256_P + 1) // 4, P256_P)


@given(st.one_of(st.integers(0, P256_P - 1), st.sampled_from([0, 1, 2, P256_P - 1, TENTH, P256_P - TENTH])))
def test_map_to_p256_is_the_rfcs_and_on_the_curve(u):
    ((x, y),) = integers(p256.map_to_curve([mpz(u)]))
    assert (x, y) == sswu(u)
    assert 0 <= x < P256_P
    assert 0 < y < P256_P
    assert y * y % P256_P == p256_side(x)


def test_a_map_of_many_takes_the_exceptions_along():
    assert TENTH * TENTH * 10 % P256_P == 1
    us = [5, 0, TENTH, 6, P256_P - TENTH]
    assert integers(p256.map_to_curve([mpz(u) for u in us])) == [sswu(u) for u in us]
    us = [5, 0, 6, P - 1]
    assert integers(curve25519.map_to_curve([mpz(u) for u in us])) == [elligator2(u) for u in us]


PINNED_P256 = (
    "05929fea0761ec006299b366c069ba073dc165025347040553eb84c7d52d0985"
    "2e30c8f27813aea2532f350ab2dc228a1967344131cd2e43880c8c02ecf8f680"
)


def test_the_suite_and_tag_of_p256_are_fixed():
    assert p256.DST == b"Colonnade-PSI-V01-CS01-with-P256_XMD:SHA-256_SSWU_RO_"
    assert NIST.hash_to_points([b"", b"abc"]).tobytes().hex() == PINNED_P256


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_a_batch_of_p256_is_its_messages_one_by_one(messages):
    batch = NIST.hash_to_points(messages)
    assert batch.shape == (len(messages), 32)
    assert batch.dtype == np.uint8
    for message, point in zip(messages, batch, strict=True):
        a, b = (sswu(int(u)) for u in p256.fields(message))
        assert point.tobytes() == add(a, b, *P256_CURVE)[0].to_bytes(32, "big")


def test_the_choice_of_suites():
    assert [suite.name for suite in group.SUITES.values()] == list(group.SUITES) == [X25519.name, NIST.name]
    with pytest.raises(ValueError, match=r"no such suite; there are curve25519_XMD:SHA-512_ELL2_RO_ and P256"):
        group.suite("P256")


# --- RFC 7748 and Wycheproof


def test_x25519_typed():
    for scalar, u, out in (
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ):
        assert X25519.mask(rows(u), bytes.fromhex(scalar)).tobytes().hex() == out


def test_x25519_rfc7748_file():
    if not (VECTORS / "rfc7748").is_dir():
        pytest.skip("the vectors rfc7748 are not on this machine")
    text = (VECTORS / "rfc7748" / "x25519_rfc7748.txt").read_text()
    for case in text.split("COUNT")[1:]:
        fields = dict(line.split(" = ") for line in case.splitlines()[1:] if " = " in line)
        got = X25519.mask(rows(fields["INPUT_U"]), bytes.fromhex(fields["INPUT_SCALAR"]))
        assert got.tobytes().hex() == fields["OUTPUT_U"]


def test_x25519_iterated():
    expected = vectors("rfc7748/x25519_iterated.json")["x25519_iterated"]
    k = u = bytes([9]) + bytes(31)
    for i in range(1, 1001):
        k, u = X25519.mask(rows(u), k).tobytes(), k
        if str(i) in expected:
            assert k.hex() == expected[str(i)]


REASONS = {"LowOrderPublic": "small order", "Twist": "twist"}  # min() takes the first


def test_wycheproof():
    suite = vectors("wycheproof/x25519_test.json")
    cases = [t for g in suite["testGroups"] for t in g["tests"]]
    assert len(cases) == suite["numberOfTests"] == 518
    for t in cases:
        point, flags = rows(t["public"]), set(t["flags"])
        # The multiplication itself follows RFC 7748 for every u, except that zero is refused.
        if "ZeroSharedSecret" in flags:
            assert not any(bytes.fromhex(t["shared"]))
            with pytest.raises(ValueError, match="small order"):
                X25519.mask(point, bytes.fromhex(t["private"]))
        else:
            assert X25519.mask(point, bytes.fromhex(t["private"])).tobytes().hex() == t["shared"], t["tcId"]
        # A received point: canonical, of large order, on the curve, asked in this order. Ten low orders are written
        # above p without the flag that says so: hence the integer decides, and the flag must agree.
        canonical = int.from_bytes(bytes.fromhex(t["public"]), "little") < P
        assert not ("NonCanonicalPublic" in flags and canonical)
        reason = "not canonical" if not canonical else REASONS.get(min(flags & set(REASONS), default=""))
        if reason:
            with pytest.raises(ValueError, match=reason):
                X25519.check_points(point)
        else:
            X25519.check_points(point)


# --- masking


@both_suites
def test_masks_commute_and_stay_on_the_curve(suite):
    points, a, b = suite.hash_to_points([b"x", b"y", b"z"]), suite.scalar(), suite.scalar()
    both = suite.mask(suite.mask(points, a), b)
    assert both.tobytes() == suite.mask(suite.mask(points, b), a).tobytes()
    assert both.tobytes() != points.tobytes()
    suite.check_points(both)
    assert suite.mask(points[:0], a).shape == (0, 32)
    assert suite.mask(points[::2], a).tobytes() == suite.mask(points, a)[::2].tobytes()


def test_a_mask_is_the_clamped_multiple_without_cofactor():
    point = tuple(map(int, curve25519.hash_to_curve([b"x"])[0]))
    scalar = secrets.token_bytes(32)
    clamped = int.from_bytes(scalar, "little") % 2**254 // 8 * 8 + 2**254
    masked = X25519.mask(X25519.hash_to_points([b"x"]), scalar)
    assert int.from_bytes(masked.tobytes(), "little") == times(clamped, point)[0]
    order = 2**252 + 27742317777372353535851937790883648493
    assert times(order, times(clamped, point)) is None


@both_suites
def test_scalars_are_fresh_and_replay(suite):
    assert len(suite.scalar()) == 32
    assert len({suite.scalar() for _ in range(100)}) == 100
    assert suite.scalar(lambda n: bytes(range(n))) == suite.scalar(lambda n: bytes(range(n)))
    for bad in (b"short", bytes(33)):
        with pytest.raises(ValueError):
            suite.mask(honest(1, suite), bad)


@given(st.one_of(st.binary(min_size=48, max_size=48), st.integers(0, 3).map(lambda i: i.to_bytes(48, "big"))))
def test_a_scalar_of_p256_is_reduced_to_1_and_above(drawn):
    scalar = int.from_bytes(NIST.scalar(lambda n: drawn[:n]), "big")
    assert scalar == int.from_bytes(drawn, "big") % (P256_N - 1) + 1
    assert 1 <= scalar < P256_N


def test_the_least_and_the_greatest_scalar_of_p256():
    for drawn, scalar in ((0, 1), (P256_N - 2, P256_N - 1), (P256_N - 1, 1)):
        assert int.from_bytes(NIST.scalar(lambda n, d=drawn: d.to_bytes(n, "big")), "big") == scalar
    points = honest(2, NIST)
    for scalar in (1, P256_N - 1):
        assert NIST.mask(points, scalar.to_bytes(32, "big")).tobytes() == points.tobytes()
    for scalar in (0, P256_N, P256_N + 1, 2**256 - 1):
        with pytest.raises(ValueError, match="between 1 and n-1"):
            NIST.mask(points, scalar.to_bytes(32, "big"))


def test_a_mask_of_p256_is_the_multiple():
    generator = 0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296
    for scalar in (NIST.scalar(), (2).to_bytes(32, "big")):
        k = int.from_bytes(scalar, "big")
        # A point of ours, in plain integers; the generator, by the library's own public key.
        (point,) = integers(p256.hash_to_curve([b"x"]))
        assert (
            NIST.mask(NIST.hash_to_points([b"x"]), scalar).tobytes() == big(times(k, point, *P256_CURVE)[0]).tobytes()
        )
        public = ec.derive_private_key(k, ec.SECP256R1()).public_key()
        encoded = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        assert NIST.mask(big(generator), scalar).tobytes() == encoded[1:33]


def test_wycheproof_p256():
    suite = vectors("wycheproof/ecdh_secp256r1_ecpoint_test.json")
    cases = [t for g in suite["testGroups"] for t in g["tests"]]
    assert len(cases) == suite["numberOfTests"] == 355
    seen = Counter()
    for t in cases:
        public, scalar = bytes.fromhex(t["public"]), int(t["private"], 16)
        if not public:  # a list of points has no row of zero bytes
            continue
        # We take the x-coordinate alone: a wrong y is no attack, and the oracle says whether there is a right one.
        point, x = rows(public[1:33]), int.from_bytes(public[1:33], "big")
        scalar_bytes = scalar.to_bytes(32, "big")
        if x >= P256_P or p256_y(x) is None:
            assert t["result"] == "invalid"
            with pytest.raises(ValueError, match="not canonical" if x >= P256_P else "not on the curve"):
                NIST.check_points(point)
            with pytest.raises(ValueError, match="not on the curve"):
                NIST.mask(point, scalar_bytes)
            seen["not canonical" if x >= P256_P else "off the curve"] += 1
        else:
            NIST.check_points(point)
            masked = NIST.mask(point, scalar_bytes).tobytes().hex()
            assert t["result"] == "invalid" or masked == t["shared"], t["tcId"]
            seen[t["result"]] += 1
    assert seen == {"valid": 330, "acceptable": 1, "invalid": 4, "not canonical": 4, "off the curve": 15}


# --- what is refused


@both_suites
def test_honest_points_pass(suite):
    for n in (0, 1, 300):
        suite.check_points(honest(n, suite))
        group.check_distinct(honest(n, suite))


@both_suites
@pytest.mark.parametrize(
    "points",
    [np.zeros((3, 31), np.uint8), np.zeros(32, np.uint8), np.zeros((3, 32), np.int8), np.zeros((1, 1, 32), np.uint8)],
)
def test_shapes_and_types_are_refused(points, suite):
    for check in (suite.check_points, lambda p: suite.mask(p, b"\1" * 32), lambda p: group.token(p, b"", 8)):
        with pytest.raises(ValueError, match="shape"):
            check(points)


@pytest.mark.parametrize(
    "points",
    [np.zeros((3, 0), np.uint8), np.zeros(32, np.uint8), np.zeros((3, 32), np.int8), np.zeros((1, 1, 9), "u1")],
)
def test_lists_of_no_rows_of_bytes_are_refused(points):
    for check in (group.check_distinct, lambda p: group.match([p, p]), lambda p: group.match([p])):
        with pytest.raises(ValueError, match=r"shape|width"):
            check(points)


def place(points: np.ndarray, position: int, bad: np.ndarray) -> np.ndarray:
    out = points.copy()
    out[position] = bad[0]
    return out


@pytest.mark.parametrize("x", [P256_P, P256_P + 1, P256_P + 2**128, 2**256 - 2**32, 2**256 - 1])
def test_what_is_not_below_p_is_refused_for_p256(x):
    bad = place(honest(20, NIST), 7, big(x))
    with pytest.raises(ValueError, match=r"1 of 20 points are not canonical, the first at position 7"):
        NIST.check_points(bad, sample=0)
    with pytest.raises(ValueError, match="position 7 of 20 is not on the curve"):
        NIST.mask(bad, NIST.scalar())


@pytest.mark.parametrize("x", [0, 1, *(P256_P - 256**i for i in range(32)), 2**256 - 2**225])
def test_canonical_is_decided_at_p_for_p256(x):
    NIST.check_points(big(x), sample=0)
    NIST.check_points(np.asfortranarray(big(x, x)), sample=0)


def test_what_is_off_the_curve_is_refused_for_p256():
    off = next(x for x in range(100) if p256_y(x) is None)
    points = place(place(honest(20, NIST), 5, big(off)), 19, big(off))
    NIST.check_points(points, sample=0)
    NIST.check_points(points[:5])
    with pytest.raises(ValueError, match=r"position (5|19) is not on the curve"):
        NIST.check_points(points)
    with pytest.raises(ValueError, match="the point at position 5 of 20 is not on the curve") as caught:
        NIST.mask(points, NIST.scalar())
    assert caught.value.__suppress_context__
    NIST.check_points(big(0))  # (0, b^(1/2)) is a point like any other
    assert p256_y(0) is not None


@pytest.mark.parametrize("u", [P, P + 1, P + 9, 2**255 - 1, 2**255, 2**255 + 9, 2**256 - 1])
def test_non_canonical_is_refused(u):
    with pytest.raises(ValueError, match=r"1 of 20 points are not canonical, the first at position 7"):
        X25519.check_points(place(honest(20), 7, rows(u)), sample=0)


@pytest.mark.parametrize("u", [P - 2, 2**254, 9, *(P - 256**i for i in range(1, 32))])
def test_canonical_is_decided_at_p(u):
    X25519.check_points(rows(u), sample=0)


def test_the_list_of_small_orders_is_right_and_complete():
    listed = {int.from_bytes(u, "little") for u in curve25519.SMALL_ORDER}
    assert len(listed) == 5
    for x in listed:
        for _ in range(3):
            x = doubled_x(x) if x is not None else None
        assert x is None
    # 8-torsion of the curve (order 8 l): 0, 1 and two of order 8. Of the twist (order 4 l'): 0 and -1.
    assert {x for x in listed if is_square(right_side(x))} == listed - {0, P - 1}
    assert not is_square(right_side(P - 1))


@pytest.mark.parametrize("u", curve25519.SMALL_ORDER, ids=lambda u: u.hex()[:6])
def test_small_order_is_refused(u):
    with pytest.raises(ValueError, match=r"1 of 20 points are of small order, the first at position 19") as caught:
        X25519.check_points(place(honest(20), 19, rows(u)), sample=0)
    assert u.hex() not in str(caught.value)
    with pytest.raises(ValueError, match="the point at position 19 of 20 is of small order") as caught:
        X25519.mask(place(honest(20), 19, rows(u)), X25519.scalar())
    assert caught.value.__suppress_context__


def test_the_twist_is_refused():
    points = place(honest(20), 5, rows(twist_point()))
    X25519.check_points(points, sample=0)
    with pytest.raises(ValueError, match="position 5 is on the twist"):
        X25519.check_points(points)


def test_a_sample_finds_many_twist_points():
    points = np.repeat(honest(1), 1000, axis=0)
    points[::4] = rows(twist_point())  # 0.75^128 is 1e-16
    with pytest.raises(ValueError, match="twist"):
        X25519.check_points(points)


def test_duplicates_are_refused_in_the_whole_list():
    points = honest(50)
    points = place(place(points, 40, points[3:4]), 45, points[3:4])
    X25519.check_points(points)
    with pytest.raises(ValueError, match=r"2 of 50 points are duplicates, the first at position 40"):
        group.check_distinct(points)


def test_points_that_differ_in_one_byte_are_distinct():
    points = np.tile(honest(1), (33, 1))
    points[np.arange(32), np.arange(32)] ^= 1
    group.check_distinct(points)
    group.check_distinct(rows(*(1 << (8 * i) for i in range(32)), 0, 1 << 255))
    group.check_distinct(np.asfortranarray(honest(5)))


def test_duplicates_are_told_apart_from_what_only_begins_alike():
    points = np.tile(honest(1), (9, 1))
    points[:, 31] = [5, 4, 3, 2, 1, 0, 4, 9, 4]
    points = np.concatenate([honest(40), points])
    with pytest.raises(ValueError, match=r"^2 of 49 tokens are duplicates, the first at position 46$"):
        group.check_distinct(points, "tokens")
    group.check_distinct(np.delete(points, [46, 48], axis=0)[1:])


@given(st.integers(1, 20), st.lists(st.binary(min_size=20, max_size=20), min_size=1, max_size=30), st.booleans())
def test_duplicates_are_what_a_set_finds(width, raw, alike):
    tokens = [(bytes(8) + r if alike else r)[:width] for r in raw]
    again = [i for i, t in enumerate(tokens) if t in tokens[:i]]
    points = np.frombuffer(b"".join(tokens), dtype=np.uint8).reshape(-1, width)
    if again:
        with pytest.raises(ValueError, match=rf"^{len(again)} of {len(raw)} .* at position {again[0]}$"):
            group.check_distinct(points)
    else:
        group.check_distinct(points)


# --- matching


def matched(lists: list[list[bytes]]) -> list[list[int]]:
    common = sorted(set(lists[0]).intersection(*lists[1:]))
    places = [{t: i for i, t in enumerate(tokens)} for tokens in lists]
    return [[place[t] for t in common] for place in places]


@st.composite
def token_lists(draw):
    """Lists of distinct tokens of one width from a small pool, so that they share some; many begin with equal bytes,
    and zeros and 255 stand at both ends."""
    width = draw(st.integers(1, 20))
    byte = st.sampled_from([0, 0, 1, 127, 128, 255])
    head = st.sampled_from([bytes(width), b"\xff" * width, bytes(range(width))])
    tail = st.lists(byte, min_size=1, max_size=min(3, width)).map(bytes)
    pool = draw(st.lists(st.builds(lambda h, t: h[: width - len(t)] + t, head, tail), unique=True, max_size=25))
    pool += draw(st.lists(st.binary(min_size=width, max_size=width), max_size=5))
    some = st.lists(st.sampled_from(pool), unique=True, max_size=30) if pool else st.just([])
    return width, draw(st.lists(some, min_size=1, max_size=4))


@given(token_lists())
def test_match_is_the_intersection_of_sets(case):
    width, lists = case
    got = group.match([np.frombuffer(b"".join(t), dtype=np.uint8).reshape(-1, width) for t in lists])
    assert [positions.tolist() for positions in got] == matched(lists)
    assert all(positions.dtype == np.uint32 for positions in got)


@pytest.mark.parametrize("width", [5, 8, 11, 12])
def test_match_of_many(width, monkeypatch):
    monkeypatch.setattr(group, "_BLOCK", 700)
    random = np.random.default_rng(width)
    pool = np.unique(random.integers(0, 256, (6000, width), dtype=np.uint8), axis=0)
    pool[:500, :-4] = 9
    pool = np.unique(pool, axis=0)
    lists = [pool[random.permutation(len(pool))[:n]] for n in (5000, 4000, 5500)]
    expected = matched([[row.tobytes() for row in rows] for rows in lists])
    assert len(expected[0]) > 1000
    assert [positions.tolist() for positions in group.match(lists)] == expected
    assert [positions.tolist() for positions in group.match([np.asfortranarray(rows) for rows in lists])] == expected


def test_match_refuses_duplicates_and_unequal_widths():
    a, b = (np.arange(n * 9, dtype=np.uint8).reshape(n, 9) for n in (5, 4))
    assert [p.tolist() for p in group.match([a, b])] == [[0, 1, 2, 3]] * 2
    for lists in ([a[[0, 1, 0]], b], [b, a[[0, 1, 2, 1]]]):
        with pytest.raises(ValueError, match=r"1 of [34] tokens are duplicates"):
            group.match(lists)
    for lists in ([a, b[:, :8]], []):
        with pytest.raises(ValueError, match="one width"):
            group.match(lists)


# --- tokens


def test_tokens(monkeypatch):
    points, session = honest(3), b"s" * 32
    tokens = group.token(points, session, 7)
    assert tokens.shape == (3, 7)
    assert tokens.dtype == np.uint8
    for point, got in zip(points, tokens, strict=True):
        assert got.tobytes() == hashlib.sha256(b"colonnade/psi/token/1" + session + point.tobytes()).digest()[:7]
    assert (tokens != group.token(points, b"t" * 32, 7)).any(axis=1).all()
    assert group.token(points[:0], session, 7).shape == (0, 7)
    many = np.random.default_rng(1).integers(0, 256, (30, 32), dtype=np.uint8)
    monkeypatch.setattr(group, "_BLOCK", 7)
    assert [t.tobytes() for t in group.token(many, session, 9)] == [
        hashlib.sha256(b"colonnade/psi/token/1" + session + p.tobytes()).digest()[:9] for p in many
    ]
    for width in (0, 33):
        with pytest.raises(ValueError, match="1 to 32"):
            group.token(points, session, width)


@given(st.one_of(st.integers(1, 2**60), st.integers(0, 60).flatmap(lambda e: st.sampled_from([2**e, 2**e + 1]))))
def test_token_width_is_the_least(total):
    width = group.token_width(total)
    assert 2 ** (8 * width) >= total**2 * 2**40
    assert 2 ** (8 * (width - 1)) < total**2 * 2**40


def test_token_width_at_known_sizes():
    assert [group.token_width(n) for n in (0, 1, 2, 16, 17, 10**6, 2**20, 2**20 + 1)] == [5, 5, 6, 6, 7, 10, 10, 11]
    assert group.token_width(10**6) == math.ceil((2 * math.log2(10**6) + 40) / 8)


# --- shuffling


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_shuffle_is_a_permutation_that_replays(n):
    order = group.shuffle_order(n, bytes(32))
    assert order.dtype == np.int64
    assert sorted(order) == list(range(n))
    assert order.tobytes() == group.shuffle_order(n, bytes(32)).tobytes()
    if n > 2:
        assert order.tobytes() != group.shuffle_order(n, b"\1" * 32).tobytes()
        assert group.shuffle_order(n).tobytes() != group.shuffle_order(n).tobytes()


def test_shuffle_is_pinned_and_wants_a_whole_key():
    assert group.shuffle_order(8, bytes(32)).tolist() == PINNED_ORDER
    with pytest.raises(ValueError):
        group.shuffle_order(8, b"short")


def test_shuffle_is_uniform_on_three():
    seen = [tuple(group.shuffle_order(3, i.to_bytes(32, "big")).tolist()) for i in range(6000)]
    counts = [seen.count(p) for p in set(seen)]
    assert len(counts) == 6
    assert sum((c - 1000) ** 2 / 1000 for c in counts) < 30  # chi squared, 5 degrees: odds 1e-5, and the keys are fixed


def test_shuffle_draws_again_on_a_tie(monkeypatch):
    class Stream:
        blocks = iter([b"\1" * 16, b"\2" * 8 + b"\1" * 8])

        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def encryptor(self) -> Stream:
            return self

        def update(self, zeros: bytes) -> bytes:
            return next(self.blocks)

    monkeypatch.setattr(group, "Cipher", Stream)
    assert group.shuffle_order(2).tolist() == [1, 0]
