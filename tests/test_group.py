"""The curve code against RFC 9380, RFC 7748, Wycheproof and plain integers."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psi import group

VECTORS = Path(__file__).resolve().parents[2] / "shared" / "vectors"
P, J = 2**255 - 19, 486662
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


def honest(n: int) -> np.ndarray:
    return group.mask(group.hash_to_points([f"id {i}".encode() for i in range(n)]), bytes(range(32)))


# An oracle in plain integers: the curve y^2 = x^3 + J x^2 + x, None for the identity.


def right_side(x: int) -> int:
    return (x**3 + J * x**2 + x) % P


def is_square(v: int) -> bool:
    return pow(v, (P - 1) // 2, P) == 1


def add(a, b):
    if a is None or b is None:
        return b if a is None else a
    (x0, y0), (x1, y1) = a, b
    if x0 == x1 and (y0 + y1) % P == 0:
        return None
    slope = (3 * x0 * x0 + 2 * J * x0 + 1) * pow(2 * y0, -1, P) if a == b else (y1 - y0) * pow(x1 - x0, -1, P)
    x = (slope * slope - J - x0 - x1) % P
    return x, (slope * (x0 - x) - y0) % P


def times(k: int, point):
    out = None
    for bit in bin(k)[2:]:
        out = add(out, out)
        out = add(out, point) if bit == "1" else out
    return out


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
    assert group.expand_message_xmd(message.encode(), dst[name], length, name).hex() == expected


@pytest.mark.parametrize("name", ["SHA256_38", "SHA256_256", "SHA512_38"])
def test_expand_message(name):
    suite = vectors(f"rfc9380/expand_message_xmd_{name}.json")
    for t in suite["tests"]:
        length = int(t["len_in_bytes"], 16)
        got = group.expand_message_xmd(t["msg"].encode(), suite["DST"].encode(), length, suite["hash"].lower())
        assert got.hex() == t["uniform_bytes"]


@pytest.mark.parametrize(("length", "dst"), [(0, b"d"), (-1, b"d"), (255 * 64 + 1, b"d"), (65536, b"d"), (32, b"")])
def test_expand_message_refuses_what_the_rfc_refuses(length, dst):
    with pytest.raises(ValueError, match="cannot expand"):
        group.expand_message_xmd(b"", dst, length)


def test_expand_message_longest_and_oversized_tag():
    longest = group.expand_message_xmd(b"", b"d", 255 * 64)
    assert len(longest) == 255 * 64
    assert len(group.expand_message_xmd(b"", b"d", 255 * 32, "sha256")) == 255 * 32
    hashed = hashlib.sha512(b"H2C-OVERSIZE-DST-" + b"d" * 256).digest()
    assert group.expand_message_xmd(b"m", b"d" * 256, 99) == group.expand_message_xmd(b"m", hashed, 99)
    assert group.expand_message_xmd(b"m", b"d" * 255, 99) != group.expand_message_xmd(b"m", hashed, 99)


@pytest.mark.parametrize(("message", "u0", "u1", "x", "y"), TYPED_RO)
def test_hash_to_curve_typed(message, u0, u1, x, y):
    dst = RFC_DST + group.SUITE.encode()
    assert group.hash_to_field(message.encode(), dst) == [int(u0, 16), int(u1, 16)]
    (point,) = group.hash_to_curve([message.encode()], dst)
    assert times(8, tuple(map(int, point))) == (int(x, 16), int(y, 16))


def hexes(point: dict) -> tuple[int, int]:
    return int(point["x"], 16), int(point["y"], 16)


def test_hash_to_curve_ro():
    suite = vectors("rfc9380/curve25519_XMD_SHA-512_ELL2_RO_.json")
    assert suite["ciphersuite"] == group.SUITE
    assert len(suite["vectors"]) == 5
    messages = [t["msg"].encode() for t in suite["vectors"]]
    points = group.hash_to_curve(messages, suite["dst"].encode())
    for t, message, point in zip(suite["vectors"], messages, points, strict=True):
        fields = group.hash_to_field(message, suite["dst"].encode())
        assert fields == [int(u, 16) for u in t["u"]]
        assert [group.map_to_curve(u) for u in fields] == [hexes(t["Q0"]), hexes(t["Q1"])]
        assert times(8, tuple(map(int, point))) == hexes(t["P"])


def test_encode_to_curve_nu():
    suite = vectors("rfc9380/curve25519_XMD_SHA-512_ELL2_NU_.json")
    assert len(suite["vectors"]) == 5
    for t in suite["vectors"]:
        (u,) = group.hash_to_field(t["msg"].encode(), suite["dst"].encode(), 1)
        assert u == int(t["u"][0], 16)
        point = group.map_to_curve(u)
        assert point == hexes(t["Q"])
        assert times(8, tuple(map(int, point))) == hexes(t["P"])


@given(st.one_of(st.integers(0, P - 1), st.sampled_from([0, 1, 2, P - 1, P - 2, pow(2, (P - 1) // 4, P)])))
def test_map_is_the_rfcs_and_on_the_curve(u):
    x, y = map(int, group.map_to_curve(group.mpz(u)))
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
    assert group.DST == b"Colonnade-PSI-V01-CS01-with-curve25519_XMD:SHA-512_ELL2_RO_"
    assert group.hash_to_points([b"", b"abc"]).tobytes().hex() == PINNED


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_a_batch_is_its_messages_one_by_one(messages):
    batch = group.hash_to_points(messages)
    assert batch.shape == (len(messages), 32)
    assert batch.dtype == np.uint8
    for message, point in zip(messages, batch, strict=True):
        assert group.hash_to_points([message]).tobytes() == point.tobytes()
        a, b = (elligator2(int(u)) for u in group.hash_to_field(message))
        assert int.from_bytes(point.tobytes(), "little") == add(a, b)[0]


def test_additions_share_a_batch_with_exceptional_ones():
    g = tuple(map(int, group.map_to_curve(group.mpz(7))))
    h = tuple(map(int, group.map_to_curve(group.mpz(8))))
    minus = (g[0], P - g[1])
    order_two = (0, 0)  # its double is the identity, encoded the same
    left, right = [g, g, g, h, minus, order_two, order_two], [h, g, minus, g, minus, order_two, g]
    got = [
        tuple(map(int, p)) for p in group._add(*([[tuple(map(group.mpz, p)) for p in side] for side in (left, right)]))
    ]
    assert got == [add(g, h), add(g, g), (0, 0), add(g, h), add(minus, minus), (0, 0), add(order_two, g)]
    assert group._add([], []) == []


def test_a_message_that_hashes_to_the_identity_is_encoded_as_zero_and_refused_by_mask(monkeypatch):
    # u and -u map to one point, so equal u double; an opposite pair needs a forged map.
    u = group.mpz(7)
    monkeypatch.setattr(group, "hash_to_field", lambda message, dst: [u, -u % P])
    assert group.hash_to_points([b"m"]).tobytes() == rows(times(2, elligator2(7))[0]).tobytes()
    x, y = group.map_to_curve(u)
    points = iter([(x, y), (x, P - y)])
    monkeypatch.setattr(group, "_elligator2", lambda u, inverse: next(points))
    zero = group.hash_to_points([b"m"])
    assert not zero.any()
    with pytest.raises(ValueError, match="small order"):
        group.mask(zero, group.random_scalar())


@given(st.lists(st.integers(0, P - 1), max_size=8))
def test_inverses(values):
    got = group._inverses([group.mpz(v) for v in values])
    assert got == [pow(v, -1, P) if v else 0 for v in values]


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
        assert group.mask(rows(u), bytes.fromhex(scalar)).tobytes().hex() == out


def test_x25519_rfc7748_file():
    if not (VECTORS / "rfc7748").is_dir():
        pytest.skip("the vectors rfc7748 are not on this machine")
    text = (VECTORS / "rfc7748" / "x25519_rfc7748.txt").read_text()
    for case in text.split("COUNT")[1:]:
        fields = dict(line.split(" = ") for line in case.splitlines()[1:] if " = " in line)
        got = group.mask(rows(fields["INPUT_U"]), bytes.fromhex(fields["INPUT_SCALAR"]))
        assert got.tobytes().hex() == fields["OUTPUT_U"]


def test_x25519_iterated():
    expected = vectors("rfc7748/x25519_iterated.json")["x25519_iterated"]
    k = u = bytes([9]) + bytes(31)
    for i in range(1, 1001):
        k, u = group.mask(rows(u), k).tobytes(), k
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
                group.mask(point, bytes.fromhex(t["private"]))
        else:
            assert group.mask(point, bytes.fromhex(t["private"])).tobytes().hex() == t["shared"], t["tcId"]
        # A received point: canonical, of large order, on the curve, asked in this order. Ten low orders are written
        # above p without the flag that says so: hence the integer decides, and the flag must agree.
        canonical = int.from_bytes(bytes.fromhex(t["public"]), "little") < P
        assert not ("NonCanonicalPublic" in flags and canonical)
        reason = "not canonical" if not canonical else REASONS.get(min(flags & set(REASONS), default=""))
        if reason:
            with pytest.raises(ValueError, match=reason):
                group.check_points(point)
        else:
            group.check_points(point)


# --- masking


def test_masks_commute_and_stay_on_the_curve():
    points, a, b = group.hash_to_points([b"x", b"y", b"z"]), group.random_scalar(), group.random_scalar()
    both = group.mask(group.mask(points, a), b)
    assert both.tobytes() == group.mask(group.mask(points, b), a).tobytes()
    assert both.tobytes() != points.tobytes()
    group.check_points(both)
    assert group.mask(points[:0], a).shape == (0, 32)
    assert group.mask(points[::2], a).tobytes() == group.mask(points, a)[::2].tobytes()


def test_a_mask_is_the_clamped_multiple_without_cofactor():
    point = tuple(map(int, group.hash_to_curve([b"x"])[0]))
    scalar = secrets.token_bytes(32)
    clamped = int.from_bytes(scalar, "little") % 2**254 // 8 * 8 + 2**254
    masked = group.mask(group.hash_to_points([b"x"]), scalar)
    assert int.from_bytes(masked.tobytes(), "little") == times(clamped, point)[0]
    order = 2**252 + 27742317777372353535851937790883648493
    assert times(order, times(clamped, point)) is None


def test_scalars_are_fresh():
    assert len(group.random_scalar()) == 32
    assert len({group.random_scalar() for _ in range(100)}) == 100
    with pytest.raises(ValueError):
        group.mask(honest(1), b"short")


# --- what is refused


def test_honest_points_pass():
    for n in (0, 1, 300):
        group.check_points(honest(n))
        group.check_distinct(honest(n))


@pytest.mark.parametrize(
    "points",
    [np.zeros((3, 31), np.uint8), np.zeros(32, np.uint8), np.zeros((3, 32), np.int8), np.zeros((1, 1, 32), np.uint8)],
)
def test_shapes_and_types_are_refused(points):
    for check in (group.check_points, group.check_distinct, lambda p: group.mask(p, bytes(32))):
        with pytest.raises(ValueError, match="shape"):
            check(points)


def place(points: np.ndarray, position: int, bad: np.ndarray) -> np.ndarray:
    out = points.copy()
    out[position] = bad[0]
    return out


@pytest.mark.parametrize("u", [P, P + 1, P + 9, 2**255 - 1, 2**255, 2**255 + 9, 2**256 - 1])
def test_non_canonical_is_refused(u):
    with pytest.raises(ValueError, match=r"1 of 20 points are not canonical, the first at position 7"):
        group.check_points(place(honest(20), 7, rows(u)), sample=0)


@pytest.mark.parametrize("u", [P - 2, 2**254, 9, *(P - 256**i for i in range(1, 32))])
def test_canonical_is_decided_at_p(u):
    group.check_points(rows(u), sample=0)


def test_the_list_of_small_orders_is_right_and_complete():
    listed = {int.from_bytes(u, "little") for u in group.SMALL_ORDER}
    assert len(listed) == 5
    for x in listed:
        for _ in range(3):
            x = doubled_x(x) if x is not None else None
        assert x is None
    # 8-torsion of the curve (order 8 l): 0, 1 and two of order 8. Of the twist (order 4 l'): 0 and -1.
    assert {x for x in listed if is_square(right_side(x))} == listed - {0, P - 1}
    assert not is_square(right_side(P - 1))


@pytest.mark.parametrize("u", group.SMALL_ORDER, ids=lambda u: u.hex()[:6])
def test_small_order_is_refused(u):
    with pytest.raises(ValueError, match=r"1 of 20 points are of small order, the first at position 19") as caught:
        group.check_points(place(honest(20), 19, rows(u)), sample=0)
    assert u.hex() not in str(caught.value)
    with pytest.raises(ValueError, match="small order") as caught:
        group.mask(place(honest(20), 19, rows(u)), group.random_scalar())
    assert caught.value.__suppress_context__


def test_the_twist_is_refused():
    points = place(honest(20), 5, rows(twist_point()))
    group.check_points(points, sample=0)
    with pytest.raises(ValueError, match="position 5 is on the twist"):
        group.check_points(points)


def test_a_sample_finds_many_twist_points():
    points = np.repeat(honest(1), 1000, axis=0)
    points[::4] = rows(twist_point())  # 0.75^128 is 1e-16
    with pytest.raises(ValueError, match="twist"):
        group.check_points(points)


def test_duplicates_are_refused_in_the_whole_list():
    points = honest(50)
    points = place(place(points, 40, points[3:4]), 45, points[3:4])
    group.check_points(points)
    with pytest.raises(ValueError, match=r"2 of 50 points are duplicates, the first at position 40"):
        group.check_distinct(points)


def test_points_that_differ_in_one_byte_are_distinct():
    points = np.tile(honest(1), (33, 1))
    points[np.arange(32), np.arange(32)] ^= 1
    group.check_distinct(points)
    group.check_distinct(rows(*(1 << (8 * i) for i in range(32)), 0, 1 << 255))
    group.check_distinct(np.asfortranarray(honest(5)))


# --- tokens


def test_tokens():
    points, session = honest(3), b"s" * 32
    tokens = group.token(points, session, 7)
    assert tokens.shape == (3, 7)
    assert tokens.dtype == np.uint8
    for point, got in zip(points, tokens, strict=True):
        assert got.tobytes() == hashlib.sha256(b"colonnade/psi/token/1" + session + point.tobytes()).digest()[:7]
    assert (tokens != group.token(points, b"t" * 32, 7)).any(axis=1).all()
    assert group.token(points[:0], session, 7).shape == (0, 7)
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
