# The full SmolLM2-135M shape on Shakespeare: 30 layers, 576 wide, 9 query and 3 key/value heads, vocabulary 5,000.
#   python train.py config/smol_shakespeare.py          # 27 minutes on two CPU cores (EPYC)
# 109 million parameters are far too many for a megabyte of text: config/tiny_shakespeare.py gives the better model.
# These 600 steps, two epochs, end before it memorizes the text; config/seed_5000.py continues until it does.
out_dir = "out/smol_shakespeare"
dataset = "shakespeare"
input = "shakespeare"
vocab_size = 5000

block_size = 256
global_batch_size = 4  # 1,024 tokens a step, since few steps fit into 27 minutes
micro_batch_size = 4
max_iters = 600  # two epochs of Tiny Shakespeare's 299,442 tokens
max_epochs = 4  # for a shorter text: on data/shakespeare/play.txt the best of 400 steps was step 100, 4 epochs
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 50
weight_decay = 0.1

eval_interval = 100
eval_rows = 64  # of 146: enough for a comparison, in 20 seconds instead of 40
log_interval = 10
sample_interval = 200
patience = 3
