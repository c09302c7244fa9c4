"""The heat map and the film of a search."""

from PIL import Image

from par_xl.training import animate_architecture, plot_architecture


def test_pictures(tmp_path):
    """As many frames as there are snapshots, up to a limit, the last one of the last step; and every frame differs."""
    history = [(10 * i, [[0.2 + i / 30, 0.5 - i / 30, 0.3], [0.1, 0.2, 0.7 - i / 1000]]) for i in range(6)]
    for limit, frames in ((4, 4), (50, 6)):
        assert animate_architecture(history, tmp_path / "a.gif", frames=limit) == frames
        with Image.open(tmp_path / "a.gif") as film:
            assert film.n_frames == frames
            shown = []
            for i in range(frames):
                film.seek(i)
                shown.append(film.convert("RGB").tobytes())
        assert len(set(shown)) == frames
    for some in (history, history[:1]):
        plot_architecture(some, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert animate_architecture(history[:1], tmp_path / "a.gif") == 1


def test_the_picture_shows_the_most_likely_choice(monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    written, write = [], Axes.text

    def spy(self, x, y, text, **options):
        written.append(text)
        return write(self, x, y, text, **options)

    monkeypatch.setattr(Axes, "text", spy)
    plot_architecture([(0, [[1 / 3] * 3] * 2), (50, [[0.7, 0.2, 0.1], [0.15, 0.05, 0.8]])], tmp_path / "a.png")
    assert written == ["attention 0.70", "identity 0.80", "attention\n0.70", "identity\n0.80"]
