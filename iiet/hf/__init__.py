"""The formats of transformers: its names and files, and this project's methods as its models.

- `weights`: a model folder, `config.json` and `model.safetensors`; what training writes, too.
- `plain_models`: configs of Llama, Qwen and other plain models, read and written.
- `published`: reads the naming of the IIET and PCformer papers' code.
- `modeling_*`: the methods as models of transformers, one file for each family. `iiet.exporting`
  copies it into the exported folder, so it imports nothing of this package.
"""
