"""The measured training: labtrain's, with receipt, trail, TensorBoard and checkpoints."""

import labtrain

if __name__ == "__main__":
    labtrain.main(config_path="conf", config_name="config")
