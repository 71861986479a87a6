# A small SmolLM2 on Shakespeare: three to four minutes on two CPU cores.
#   python train.py config/tiny_shakespeare.py
out_dir = "out/tiny_shakespeare"
dataset = "shakespeare_1k"  # of Tiny Shakespeare, which is downloaded if it is not there
vocab_size = 1024  # of 300,000 words few are frequent: a large vocabulary would be mostly untrained

hidden_size = 256
intermediate_size = 704  # 8/3 of 256, rounded to 64
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2

block_size = 128
global_batch_size = 16  # many small steps beat few big ones at this scale
micro_batch_size = 16
max_iters = 1200  # six times through the text; more of them, even three times as many, memorize it
learning_rate = 4e-3
min_lr = 1e-4
warmup_iters = 50
weight_decay = 0.5  # with the noise, against memorizing: 2.13 bits per byte without the two, at its best
token_noise = 0.1

eval_interval = 300
log_interval = 50
sample_interval = 600
