# The lowest loss on Shakespeare we have reached from scratch: three million parameters, kept from memorizing it.
#   python train.py config/best_shakespeare.py        # twenty minutes on two CPU cores
out_dir = "out/best_shakespeare"
dataset = "shakespeare_1k"
input = "shakespeare"  # Tiny Shakespeare, downloaded if necessary
vocab_size = 1024

hidden_size = 256
intermediate_size = 704  # 8/3 of 256, rounded to 64
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2

block_size = 256
global_batch_size = 8
micro_batch_size = 8
max_iters = 3500
max_epochs = 18  # for a text shorter than Tiny Shakespeare
optimizer = "muon"
learning_rate = 4e-3
min_lr = 0.0
warmup_iters = 50
# against memorizing, see docs/experiments.md
weight_decay = 1.5
token_noise = 0.1
noise_until = 0.85  # the last 525 steps train on the unchanged text
dropout = 0.1

eval_interval = 500
log_interval = 100
sample_interval = 1500
