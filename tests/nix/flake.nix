# What flake.nix and nix/env.nix ask of nixpkgs, answered by a Debian machine: Python, bash, patchelf and the C++ library
# are the host's, so this needs Nix's sandbox off. Wheels lie in a folder that host.json names; tests/real/environment/test_nix.py writes it.
{
  description = "A stand-in for nixpkgs";

  outputs =
    { self }:
    let
      host = builtins.fromJSON (builtins.readFile ./host.json);
      system = "x86_64-linux";
      PATH = "/usr/bin:/bin";
      bash =
        attributes:
        derivation (
          {
            inherit system PATH;
            builder = "/bin/bash";
          }
          // attributes
        );

      lib = rec {
        concatMapStrings = f: list: builtins.concatStringsSep "" (map f list);
        hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
        hasSuffix =
          suffix: text:
          let
            cut = builtins.stringLength text - builtins.stringLength suffix;
          in
          cut >= 0 && builtins.substring cut (-1) text == suffix;
        makeLibraryPath = list: builtins.concatStringsSep ":" (map (package: "${package}/lib") list);
        optionals = condition: list: if condition then list else [ ];
        optionalString = condition: text: if condition then text else "";
        removePrefix =
          prefix: text:
          if hasPrefix prefix text then
            builtins.substring (builtins.stringLength prefix) (-1) text
          else
            text;
      };

      # Nix kills a builder that has closed its output, and some kernels let that overtake the exit status ("signal 9"):
      # a child outlives the builder.
      runCommand =
        name: attributes: script:
        bash (
          removeAttrs attributes [ "passthru" ]
          // {
            inherit name;
            args = [
              "-euc"
              "trap 'sleep 0.1 &' EXIT\n${script}"
            ];
          }
        )
        // (attributes.passthru or { });

      libraries = runCommand "host-libraries" { } ''
        mkdir -p $out/lib
        for name in libgcc_s.so.1 libstdc++.so.6 libz.so.1; do
          ln -s "$(/sbin/ldconfig -p | sed -n "s|^\s*$name (libc6,x86-64) => ||p" | head -n 1)" $out/lib/$name
        done
      '';

      # A download by hash, like nixpkgs' own: builtin:fetchurl is part of Nix.
      fetchPypi =
        {
          pname,
          version,
          hash,
          format ? "setuptools",
          extension ? "tar.gz",
          dist ? "py3",
          python ? "py3",
          abi ? "none",
          platform ? "any",
        }:
        let
          name =
            if format == "wheel" then
              "${pname}-${version}-${python}-${abi}-${platform}.whl"
            else
              "${pname}-${version}.${extension}";
        in
        import <nix/fetchurl.nix> {
          inherit name hash;
          url = "file://${host.wheels}/${name}";
        };

      # Not an image: the files that extraCommands makes, with their rights, and the config.
      dockerTools.streamLayeredImage =
        {
          name,
          tag,
          contents,
          extraCommands,
          config,
        }:
        runCommand "${name}-${tag}" { } ''
          mkdir -p $out/root
          cd $out/root
          ${extraCommands}
          find . -type d -printf '%P %m\n' > $out/modes.txt
          cat > $out/config.json <<'JSON'
          ${builtins.toJSON config}
          JSON
        '';

      mkShell =
        { packages, shellHook }:
        bash {
          inherit shellHook;
          name = "nix-shell";
          outputs = [ "out" ]; # nix develop asks for it
          PATH = "${lib.concatMapStrings (package: "${package}/bin:") packages}${PATH}";
          args = [
            "-c"
            "export > $out"
          ];
        };
    in
    {
      legacyPackages.${system} = {
        inherit
          lib
          runCommand
          fetchPypi
          mkShell
          dockerTools
          ;
        # Whichever Python runs the tests.
        python312 = {
          inherit (host) interpreter libPrefix;
        };
        bashInteractive = "/usr";
        cacert = "/usr";
        coreutils = "/usr";
        gitMinimal = "/usr";
        openssh = "/usr";
        tini = "/usr";
        stdenv.cc = {
          cc.lib = libraries;
          bintools.dynamicLinker = "/lib64/ld-linux-x86-64.so.2";
        };
        zlib = libraries;
        patchelf = "/usr";
        runtimeShell = "/bin/bash";
        nixfmt-tree = runCommand "nixfmt" { } "touch $out";
      };
    };
}
