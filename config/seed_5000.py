# The experiment that this project comes from: the full shape on Shakespeare, 5,000 steps, then 50 more after a resume.
#   python train.py config/smol_shakespeare.py config/seed_5000.py
#   python train.py config/smol_shakespeare.py config/seed_5000.py --max_iters=5050
# Add it to config/smol_shakespeare.py. These are 17 epochs: after six the validation loss rises, while the training
# loss falls to 0.2. out/seed_5000 keeps the best model, of step 1,750. The run takes a little over three minutes on an
# H200 with --compile=on, and 8.5 to 10 hours on two CPU cores, judging by its first 1,000 steps. docs/recipes.md has
# the curve.
out_dir = "out/seed_5000"

max_iters = 5000
max_epochs = 18
patience = 0  # to the end, whatever the validation loss does

eval_interval = 250
log_interval = 50
sample_interval = 2500
