# A small SmolLM2 on Shakespeare: five and a half minutes on two slow CPU cores.
#   python train.py config/tiny_shakespeare.py
out_dir = "out/tiny_shakespeare"
dataset = "shakespeare_1k"  # of Tiny Shakespeare, which is downloaded if it is not there
vocab_size = 1024  # of 200,000 words few are frequent: a large vocabulary would be mostly untrained

hidden_size = 256
intermediate_size = 704  # 8/3 of 256, rounded to 64
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2

block_size = 256
global_batch_size = 8  # many small steps beat few big ones at this scale
micro_batch_size = 8
max_iters = 900  # four and a half times through the text
max_epochs = 7  # of a shorter text: the run ends before it is known by heart
optimizer = "muon"  # 2.07 to 2.09 bits per byte after 900 steps; AdamW took 1,200 for 2.09, each three quarters as long
learning_rate = 4e-3
min_lr = 1e-4
warmup_iters = 50
weight_decay = 1.5  # with the noise, against memorizing a short text
token_noise = 0.1

eval_interval = 300
log_interval = 50
sample_interval = 450
