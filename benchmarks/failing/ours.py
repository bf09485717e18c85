"""The measured training: labtrain's."""

import labtrain

if __name__ == "__main__":
    labtrain.main(config_path="conf", config_name="config")
