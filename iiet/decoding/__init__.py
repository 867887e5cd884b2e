"""How text is generated, token by token.

- `request`: what is to be generated, as a user asks for it.
- `generation`: the loop, which fills the cache with the prompt, and then takes one step per token.
- `sampling`: chooses a token from logits.
- `speculative`: drafts tokens by a cheap schedule, and verifies them with the whole model.
- `static_steps`: records a step as a CUDA graph.

`iiet.decoder` calls it by `Decoder.generate` and `Decoder.stream`.
"""
