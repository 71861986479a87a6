# A small SmolLM2 on Shakespeare: two minutes on two CPU cores (Intel Xeon).
#   python train.py config/tiny_shakespeare.py
# Two layers and a million parameters. Within two minutes, four layers and three million parameters see a third as much
# text and predict it worse (2.34 bits per byte instead of 2.10, both with a cosine schedule).
out_dir = "out/tiny_shakespeare"
dataset = "shakespeare_1k"
input = "shakespeare"  # Tiny Shakespeare, downloaded if necessary
vocab_size = 1024  # in 200,000 words few are frequent, so a large vocabulary would be mostly untrained

hidden_size = 192
intermediate_size = 512  # 8/3 of 192
num_hidden_layers = 2
num_attention_heads = 3
num_key_value_heads = 1

block_size = 256
global_batch_size = 8  # many small steps beat few big ones at this scale
micro_batch_size = 8
max_iters = 900  # four and a half epochs
max_epochs = 7  # for a shorter text: the run ends before it is memorized
optimizer = "muon"  # a lower loss than AdamW after the same time, in fewer steps
learning_rate = 4e-3  # 8e-3 and 14e-3 ended at the same loss with a cosine schedule
min_lr = 1e-4
warmup_iters = 20
lr_schedule = "wsd"  # at the peak for half of the run, then linear decay: 0.01 to 0.02 lower than a cosine
decay_fraction = 0.5
weight_decay = 0.5

eval_interval = 300
log_interval = 50
sample_interval = 450
