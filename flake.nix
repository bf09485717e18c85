# The environment of requirements.lock, built by Nix; labtrain's repository and each experiment carry this same file.
#
#     nix develop                     # a shell with Python 3.12, every locked wheel and labtrain
#     nix run .#labtrain -- doctor    # one command of it
#     nix build .#image               # ./result | docker load: as containers/Containerfile, by Nix
#     nix build .#env-small           # hydra and a few others: does Nix work here?
#
# Flakes see only files that git knows: `git add` them first.
{
  description = "The locked environment of labtrain";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { self, nixpkgs }:
    let
      system = "x86_64-linux"; # the one platform that nix/wheels.json is locked for
      pkgs = nixpkgs.legacyPackages.${system};
      build =
        only:
        import ./nix/env.nix {
          inherit pkgs only;
          python = pkgs.python312; # as in nix/wheels.json
          root = ./.;
        };
      full = build null;
      small = build [
        "antlr4-python3-runtime" # the lock's one source distribution
        "click"
        "hydra-core"
        "markdown-it-py"
        "mdurl"
        "omegaconf"
        "packaging"
        "pygments"
        "pyyaml"
        "rich"
        "safetensors"
        "xxhash"
      ];
    in
    {
      packages.${system} = {
        default = full.env;
        env = full.env;
        env-small = small.env;
        inherit (full) image;
      };
      apps.${system}.labtrain = {
        type = "app";
        program = full.labtrain;
      };
      devShells.${system} = {
        default = full.shell;
        small = small.shell;
      };
      checks.${system} = {
        env = full.check;
        env-small = small.check;
      };
      # nixfmt in the style of RFC 166: the name nixfmt-rfc-style is an alias of it on its way out since 25.11, and
      # newer Nix calls a formatter without files, which this wrapper finds.
      formatter.${system} = pkgs.nixfmt-tree;
    };
}
