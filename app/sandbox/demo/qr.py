"""QR codes of short texts (ISO/IEC 18004), as far as an address needs them.

Byte mode, error correction L, versions 1 to 5 (whose codewords are one block), and always the same mask. Own code,
since a package would be in every broker's image for one picture of the sandbox.
"""

_VERSIONS = {1: (19, 7), 2: (34, 10), 3: (55, 15), 4: (80, 20), 5: (108, 26)}
"""Codewords of data and of error correction, by version."""
_QUIET = 4
"""Light modules around the code."""
_LEVEL_L, _MASK = 0b01, 0

_EXP = [1]
for _ in range(254):  # the powers of 2 in GF(256), modulo x^8 + x^4 + x^3 + x^2 + 1
    _EXP.append(_EXP[-1] << 1 ^ (0x11D if _EXP[-1] & 0x80 else 0))
_LOG = {value: power for power, value in enumerate(_EXP)}

Modules = dict[tuple[int, int], bool]
"""Dark or light, by row and column."""


def qr_svg(text: str) -> str:
    """Return a QR code of `text` as SVG, dark on white. Raises ValueError over 106 bytes."""
    modules = qr_modules(text)
    size = max(row for row, _ in modules) + 1 + 2 * _QUIET
    dark = "".join(f"M{column + _QUIET} {row + _QUIET}h1v1h-1z" for (row, column), on in sorted(modules.items()) if on)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" shape-rendering="crispEdges">'
        f'<rect width="{size}" height="{size}" fill="#fff"/><path d="{dark}"/></svg>'
    )


def qr_modules(text: str) -> Modules:
    """Return the modules of the smallest code that holds `text` in UTF-8. Raises ValueError over 106 bytes."""
    data = text.encode()
    version = next((each for each, (room, _) in _VERSIONS.items() if len(data) + 2 <= room), None)
    if version is None:
        raise ValueError("takes at most 106 bytes")
    modules = _function_patterns(version)
    places = _data_places(version, modules)
    bits = (byte >> shift & 1 for byte in _codewords(data, *_VERSIONS[version]) for shift in range(7, -1, -1))
    for row, column in places:
        modules[row, column] = bool(next(bits, 0)) ^ ((row + column) % 2 == 0)  # mask 0; the bits that are left are 0
    return modules


def _codewords(data: bytes, room: int, checks: int) -> bytes:
    """Return mode, length, data and padding, then the Reed-Solomon remainder."""
    bits = f"0100{len(data):08b}" + "".join(f"{byte:08b}" for byte in data) + "0000"
    filled = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    filled += bytes([0xEC, 0x11] * room)[: room - len(filled)]
    generator = [1]
    for power in range(checks):
        raised = [*generator, 0]
        for place, factor in enumerate(generator):
            raised[place + 1] ^= _times(factor, _EXP[power])
        generator = raised
    remainder = [*filled, *[0] * checks]
    for place in range(room):
        factor = remainder[place]
        for step, each in enumerate(generator):
            remainder[place + step] ^= _times(factor, each)
    return filled + bytes(remainder[room:])


def _times(a: int, b: int) -> int:
    return _EXP[(_LOG[a] + _LOG[b]) % 255] if a and b else 0


def _function_patterns(version: int) -> Modules:
    """Return what is the same in each code of this version: finders, timing, alignment, format."""
    size = 17 + 4 * version
    modules: Modules = {}
    for top, left in ((0, 0), (0, size - 7), (size - 7, 0)):
        for row in range(max(0, top - 1), min(size, top + 8)):
            for column in range(max(0, left - 1), min(size, left + 8)):
                modules[row, column] = _ring(row - top - 3, column - left - 3) not in (2, 4)
    for at in range(8, size - 8):
        modules[6, at] = modules[at, 6] = at % 2 == 0
    if version > 1:
        centre = size - 7
        for row in range(-2, 3):
            for column in range(-2, 3):
                modules[centre + row, centre + column] = _ring(row, column) != 1
    modules[size - 8, 8] = True
    for place, on in enumerate(_format_bits()):
        # Both copies: around the first finder, and divided between the other two.
        first = (8, place + (place > 5)) if place < 8 else (14 - place + (place < 9), 8)
        second = (size - 1 - place, 8) if place < 7 else (8, size - 15 + place)
        modules[first] = modules[second] = on
    return modules


def _ring(row: int, column: int) -> int:
    return max(abs(row), abs(column))


def _format_bits() -> list[bool]:
    """Return level and mask with their BCH code, most significant bit first."""
    known = _LEVEL_L << 3 | _MASK
    rest = known << 10
    for shift in range(4, -1, -1):
        if rest >> shift + 10 & 1:
            rest ^= 0x537 << shift
    coded = (known << 10 | rest) ^ 0x5412
    return [bool(coded >> bit & 1) for bit in range(14, -1, -1)]


def _data_places(version: int, taken: Modules) -> list[tuple[int, int]]:
    """Return the places that are not taken, in the order of the bits: pairs of columns, up and down, from the right."""
    size = 17 + 4 * version
    places = []
    for number, right in enumerate((*range(size - 1, 6, -2), 5, 3, 1)):  # column 6 is timing
        rows = range(size - 1, -1, -1) if number % 2 == 0 else range(size)
        places += [(row, column) for row in rows for column in (right, right - 1) if (row, column) not in taken]
    return places
