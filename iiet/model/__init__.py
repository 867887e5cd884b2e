"""What a model is made of, below the methods.

- `config`: method, sizes and schedule of a model; `facts` says what each method adds to them.
- `schedule`: how many corrections each layer makes, and which layers are left out.
- `layers`: the field of a layer, one Llama block; `fast` has equal but faster forms for CPUs.
- `mix`: how a layer reads the estimates of earlier layers.
- `context`, `cache`: what all evaluations of a pass share; keys and values of earlier tokens.
- `batch`, `losses`: what a model reads and must predict, and how far off it is.

`iiet.methods` makes layers of these, and `iiet.decoder` a model of the layers. `config`, `facts`
and `schedule` do not load torch.
"""
