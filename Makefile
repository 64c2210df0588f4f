# `make demo`: pre-train on synthetic faces and look. `make test`: everything that must hold.

PYTHON ?= python3
RUN = .venv/bin/python
FACES = --data_path synthetic:256 --batch_size 32 --lr 1.5e-3 --clip_grad 1 --save_ckpt_num 1 \
	--print_freq 100 --norm_pix_loss False

.PHONY: demo test test-long lint clean

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/run
	$(RUN) main_pretrain.py --model mae_vit_tiny_patch16 --input_size 64 --patch_size 8 \
		--decoder_embed_dim 128 --decoder_depth 2 --decoder_num_heads 4 --mask_ratio 0.6 \
		--epochs 110 --warmup_epochs 5 --vis_freq 22 --output_dir demo/mae $(FACES)
	$(RUN) main_pretrain.py --model convnextv2_atto --input_size 128 --decoder_embed_dim 128 \
		--mask_ratio 0.5 --epochs 40 --warmup_epochs 3 --vis_freq 8 --output_dir demo/fcmae $(FACES)
	$(RUN) -m util.report demo/mae demo/fcmae --output demo/report.html

test: .venv/dev lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not long"

test-long: .venv/dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m long

lint: .venv/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf demo output_dir .pytest_cache .ruff_cache
