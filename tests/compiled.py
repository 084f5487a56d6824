"""The compiled programs of a model, as tests look for them."""


def decode_steps(model):
    """The programs that draw one next token for each of their rows."""
    return [program for key, program in model.programs.compiled.items() if key[0] == "advance" and key[1][1] == 1]


def watch(monkeypatch, model, before=lambda batch: None, after=lambda batch: None):
    """Call `before` and `after` with the batch of each call that adds tokens to sequences."""
    advance = model.programs.advance

    def watched(cache, newest, batch, window, most):
        before(batch)
        result = advance(cache, newest, batch, window, most)
        after(batch)
        return result

    monkeypatch.setattr(model.programs, "advance", watched)


def is_step(batch):
    return batch.tokens.shape[1] == 1
