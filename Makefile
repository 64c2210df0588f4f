# `make demo`: the whole story on drawn faces, in minutes. `make test`: everything that must hold.
# `make app`: a page to try what the demo has trained.

PYTHON ?= python3
RUN = .venv/bin/python
# Small enough for a few minutes of two cores, large enough to show something.
SMALL = --input_size 48 --patch_size 16 --clip_grad 1 --lr 7e-4 --warmup_epochs 1 \
	--num_workers 0 --print_freq 1000 --save_ckpt_freq 100
PRETRAIN = --model mae_vit_tiny_patch16 --data_path synthetic-lab:4000 --mask_ratio 0.5 \
	--decoder_embed_dim 128 --decoder_depth 1 --decoder_num_heads 4 \
	--batch_size 16 --epochs 20 --vis_freq 5
FEW_LABELS = --model vit_tiny_patch16 --data_path synthetic-lab:160:400 --aug randaug --aa '' \
	--crop_scale 0.8 --crop_pct 1 --reprob 0 --drop_path 0 --layer_decay 0.8 \
	--batch_size 8 --epochs 24
# A run a core is faster than a run on both.
THREE_SEEDS = OMP_NUM_THREADS=1 $(RUN) benchmarks/reproduce.py $(SMALL) $(FEW_LABELS) --seeds 0 1 2

.PHONY: demo demo/pre-trained demo/from-scratch app test test-long lint clean

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt requirements-app.txt requirements-detect.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

.venv/app: .venv/run requirements-app.txt requirements-detect.txt
	$(RUN) -m pip install --quiet -r requirements-app.txt
	touch $@

demo: .venv/run
	$(RUN) main_pretrain.py $(SMALL) $(PRETRAIN) --output_dir demo/pre-training
	$(MAKE) -j2 demo/pre-trained demo/from-scratch
	$(RUN) -m util.report demo/pre-training demo/pre-trained/seed-* demo/from-scratch/seed-* \
		--output demo/report.html

demo/pre-trained: .venv/run
	$(THREE_SEEDS) --finetune demo/pre-training/checkpoint-last.pth --output_dir $@

demo/from-scratch: .venv/run
	$(THREE_SEEDS) --output_dir $@

app: .venv/app
	$(RUN) app.py

test: .venv/dev lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m "not long"

test-long: .venv/dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m long

lint: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf demo output_dir .pytest_cache .ruff_cache
