# Half a million parameters, in ten seconds on two CPU cores (Intel Xeon). Add it to config/tiny_shakespeare.py.
#   python train.py config/tiny_shakespeare.py config/ten_seconds.py
out_dir = "out/ten_seconds"

hidden_size = 128
intermediate_size = 352  # 8/3 of 128, rounded to 32
num_attention_heads = 2

block_size = 128
global_batch_size = 4  # 512 tokens a step: at first, more steps help more than less noisy ones
micro_batch_size = 4
max_iters = 260  # they see a third of the text, once, so nothing is memorized
learning_rate = 12e-3
weight_decay = 0.1

eval_interval = 260
sample_interval = 260
