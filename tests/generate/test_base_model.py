"""A base model, which has no vision head."""

from pathlib import Path

import pytest
from tiny_checkpoint import prompts

from megatron_unimm.data.sample import Turn
from megatron_unimm.errors import UserError
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.sampling import DecodeSettings


def test_answers_in_text_only(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Generator.load(tiny / "base") as generator:
        assert not generator.draws
        with pytest.raises(UserError, match="cannot generate images"):
            prompts(generator)
        ids = generator.stage.model.token_ids
        original = generator.staged.logits

        def eager(hidden):
            logits = original(hidden)
            logits[:, ids.vision_start] = 1e4
            return logits

        monkeypatch.setattr(generator.staged, "logits", eager)
        answer = generator.answer([generator.prompt([Turn("user", ("Draw.",))])], DecodeSettings(max_new_tokens=5))[0]
        assert ids.vision_start not in answer.token_ids
        assert not answer.images
