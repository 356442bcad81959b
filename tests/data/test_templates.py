"""Prompt templates."""

from collections import Counter

from megatron_unimm.data.templates import (
    EDIT_TEMPLATES,
    IMAGE_TEMPLATES,
    fill_edit_template,
    fill_template,
    template_rng,
)


def test_pure_function_of_seed_sample_and_epoch():
    def text(seed, sample_id, epoch):
        return fill_template("a red circle", template_rng(seed, sample_id, epoch))

    assert text(1, "x/7", 0) == text(1, "x/7", 0)
    for other in [(2, "x/7"), (1, "x/8")]:
        assert any(text(1, "x/7", epoch) != text(*other, epoch) for epoch in range(8))
    assert len({text(1, "x/7", epoch) for epoch in range(50)}) > 10


def test_every_template_and_style_comes():
    for fill, templates in ((fill_template, IMAGE_TEMPLATES), (fill_edit_template, EDIT_TEMPLATES)):
        counts = Counter(fill("cap", template_rng(0, str(i), 0)) for i in range(3000))
        assert len(counts) == sum(map(len, templates))
        for style in templates:
            share = sum(counts[t.format("cap")] + counts[t.format("cap").replace("cap", "Cap")] for t in style) / 3000
            assert abs(share - 1 / 3) < 0.04  # 4.6 standard deviations


def test_sentences_are_well_formed():
    rng = template_rng(0, "a", 0)
    for _ in range(100):
        text = fill_template("A red circle.", rng)
        assert "a red circle" in text
        assert text[0].isupper()
        assert text[-1] in ".?"
        assert "Paris at night" in fill_template("Paris at night", rng)
        edit = fill_edit_template("Remove the blue square.", rng)
        assert "emove the blue square" in edit
        assert edit[0].isupper()
        assert edit[-1] in ".?"
