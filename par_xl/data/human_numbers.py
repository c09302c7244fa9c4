"""The human-numbers corpus of fastbook, chapter 12, generated: the numbers from 1 to 9999 written out in English."""

_UNITS = "zero one two three four five six seven eight nine"
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety"
_BELOW_20, _TENS_WORDS = f"{_UNITS} {_TEENS}".split(), _TENS.split()


def human_numbers() -> list[str]:
    """The 63,095 tokens ``one . two . three . ... . nine thousand nine hundred ninety nine``.

    There are 9,998 numbers: fastai's files stop at 7999 and go on at 8001, and the published results are for those.
    """
    lines = [_in_words(n) for n in range(1, 10_000) if n != 8000]
    return " . ".join(lines).split()


def _in_words(n: int) -> str:
    if n >= 1000:
        return _join(n // 1000, "thousand", n % 1000)
    if n >= 100:
        return _join(n // 100, "hundred", n % 100)
    if n >= 20:
        return _TENS_WORDS[n // 10] + (f" {_BELOW_20[n % 10]}" if n % 10 else "")
    return _BELOW_20[n]


def _join(count: int, unit: str, rest: int) -> str:
    return f"{_in_words(count)} {unit}" + (f" {_in_words(rest)}" if rest else "")
