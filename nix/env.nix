# Every wheel of nix/wheels.json in ONE site-packages, and labtrain.
#
# Wheels find each other's libraries by paths relative to themselves (torch and nvidia-* do), so side by side they work
# as they are: nothing in them is patched but programs' interpreters. autoPatchelf would drop those relative paths.
# wheels.json says which file each package of requirements.lock is on CPython 3.12 and x86-64 Linux: no markers here.
{
  pkgs,
  python,
  root, # of the flake: labtrain's source tree, or an experiment, which has labtrain's wheel in vendor/
  only ? null, # names; null: all
}:
let
  inherit (pkgs) lib;
  inherit (builtins) elem filter;

  locked = builtins.fromJSON (builtins.readFile ./wheels.json);
  installed = filter (p: only == null || elem p.name only) locked;
  # What builds: the sdist's backend, labtrain's and what that imports, and pip, which runs from its own wheel.
  builders = filter (
    p:
    elem p.name [
      "hatchling"
      "packaging"
      "pathspec"
      "pip"
      "pluggy"
      "setuptools"
      "trove-classifiers"
    ]
  ) locked;

  isWheel = p: p.format == "wheel";
  numbered = p: p.version + lib.optionalString ((p.build or null) != null) "-${p.build}";
  fileName =
    p:
    if isWheel p then
      "${p.pname}-${numbered p}-${p.python}-${p.abi}-${p.platform}.whl"
    else
      "${p.pname}-${p.version}.${p.extension}";
  fetch =
    p:
    pkgs.fetchPypi (
      if isWheel p then
        {
          inherit (p)
            pname
            format
            dist
            python
            abi
            platform
            hash
            ;
          version = numbered p; # fetchPypi knows no build tags, but only joins what it is given
        }
      else
        {
          inherit (p)
            pname
            version
            extension
            hash
            ;
        }
    );

  # A store path begins with its hash; pip wants a file's own name.
  link = p: "ln -s ${fetch p} ${fileName p}\n";
  requirements =
    ps: builtins.toFile "requirements.txt" (lib.concatMapStrings (p: "${p.name}==${p.version}\n") ps);
  # --ignore-installed: pip itself and what else is on PYTHONPATH does not count as there.
  install = "-m pip install -q --no-index --no-deps --no-cache-dir --no-compile --ignore-installed --no-warn-script-location --find-links .";
  prepare = ''
    export HOME=$TMPDIR SOURCE_DATE_EPOCH=315532800 # 1980, the first year of a zip file
    export PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
    export PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 PYTHONHASHSEED=0
    mkdir $TMPDIR/files
    cd $TMPDIR/files
  '';
  backends = pkgs.runCommand "labtrain-builders" { } ''
    ${prepare}
    ${lib.concatMapStrings link builders}
    PYTHONPATH=$(echo $PWD/pip-*.whl) ${python.interpreter} ${install} --target $out -r ${requirements builders}
  '';
  toWheel =
    name: source:
    pkgs.runCommand "${name}-wheel" { } ''
      ${prepare}
      ${source}
      PYTHONPATH=${backends} ${python.interpreter} -m pip wheel -q --no-index --no-deps --no-build-isolation \
        --no-cache-dir -w $out ./*
    '';
  linkWheel =
    p: if isWheel p then link p else "ln -s ${toWheel "${p.name}-${p.version}" (link p)}/*.whl .\n";

  # Of the repository only what pyproject.toml puts into the wheel: a changed test does not cause a build.
  project = builtins.fromTOML (builtins.readFile (root + "/pyproject.toml"));
  packed =
    project.tool.hatch.build.targets.wheel
      or (throw "vendor/ holds no wheel that git knows. hint: git add vendor");
  inputs =
    packed.packages
    ++ builtins.attrNames packed.force-include
    ++ project.project.license-files
    ++ [
      project.project.readme
      "pyproject.toml"
    ];
  below = path: folder: path == folder || lib.hasPrefix "${folder}/" path;
  source = builtins.path {
    name = "labtrain-source";
    path = root;
    filter =
      path: _:
      let
        relative = lib.removePrefix "${toString root}/" path;
      in
      builtins.any (input: below relative input || below input relative) inputs;
  };
  vendored = lib.optionals (builtins.pathExists (root + "/vendor")) (
    filter (lib.hasSuffix ".whl") (builtins.attrNames (builtins.readDir (root + "/vendor")))
  );
  # Held against labtrain.lock before anything of it runs, as setup.sh does.
  named = builtins.match "\\./vendor/([A-Za-z0-9_.+-]+[.]whl) --hash=sha256:([0-9a-f]{64})\n" (
    builtins.readFile (root + "/labtrain.lock")
  );
  wheel = builtins.elemAt named 0;
  labtrain =
    if vendored != [ ] then
      if named == null || !(builtins.elem wheel vendored) then
        throw "labtrain.lock names no wheel in vendor/ with its sha256. hint: git checkout vendor labtrain.lock"
      else if builtins.hashFile "sha256" (root + "/vendor/${wheel}") != builtins.elemAt named 1 then
        throw "the sha256 of vendor/${wheel} is not the one in labtrain.lock. hint: git checkout vendor labtrain.lock"
      else
        "ln -s ${root + "/vendor/${wheel}"} ${wheel}\n"
    else
      "ln -s ${toWheel "labtrain" "cp -r ${source} labtrain; chmod -R u+w labtrain\n"}/*.whl .\n";

  # All that the wheels want from a system beside glibc. Loaded at start-up by their full names, they serve each library
  # that later asks for them by their short ones; LD_LIBRARY_PATH would reach child processes as well.
  systemLibraries = [
    "${pkgs.stdenv.cc.cc.lib}/lib/libgcc_s.so.1"
    "${pkgs.stdenv.cc.cc.lib}/lib/libstdc++.so.6"
    "${pkgs.zlib}/lib/libz.so.1"
  ];
  preload = "import ctypes; [ctypes.CDLL(path) for path in (${
    lib.concatMapStrings (path: "'${path}', ") systemLibraries
  })]";

  env =
    pkgs.runCommand "labtrain-env" { passthru.names = map (p: p.name) (installed ++ builders); }
      ''
        ${prepare}
        ${lib.concatMapStrings linkWheel installed}
        ${labtrain}
        ${python.interpreter} -m venv --without-pip $out
        PYTHONPATH=${backends} $out/bin/python ${install} -r ${requirements installed} labtrain
        site=$out/lib/${python.libPrefix}/site-packages
        echo "${preload}" > $site/_labtrain_preload.pth

        # Programs (ptxas, uv, wandb-core, ...) name an interpreter that NixOS does not have.
        cd $site
        find . $out/bin -type f -perm -u+x ! -name '*.so*' | while read -r program; do
          ${pkgs.patchelf}/bin/patchelf --print-interpreter "$program" >/dev/null 2>&1 || continue
          ${pkgs.patchelf}/bin/patchelf --set-interpreter ${pkgs.stdenv.cc.bintools.dynamicLinker} \
            --add-rpath ${
              lib.makeLibraryPath [
                pkgs.stdenv.cc.cc.lib
                pkgs.zlib
              ]
            } "$program"
          sed -i "s|^''${program#./},.*|''${program#./},,|" ./*.dist-info/RECORD
        done
        # Scripts and programs in bin/ are not the wheels' any more: RECORD keeps their names without a hash.
        sed -i -E 's|^(\.\./\.\./\.\./bin/[^,]*),.*|\1,,|' ./*.dist-info/RECORD
        # Some wheels carry files for another Python, which do not compile; nothing imports them.
        $out/bin/python -m compileall -q -j "$NIX_BUILD_CORES" --invalidation-mode unchecked-hash . >/dev/null || true
      '';

  # libcuda and NVML belong to the machine's driver, never to Nix. Links to the driver's own libraries and to no others,
  # for the rest of a host's library folder would displace Nix's. Links are put over those of another shell, not removed.
  driver = builtins.toFile "driver.sh" ''
    unset PYTHONPATH
    export PYTHONNOUSERSITE=1
    if [ -e /run/opengl-driver/lib/libcuda.so.1 ]; then # NixOS
      TRITON_LIBCUDA_PATH=/run/opengl-driver/lib
    else # another distribution; under WSL the libraries are not ldconfig's
      TRITON_LIBCUDA_PATH=''${XDG_CACHE_HOME:-$HOME/.cache}/labtrain/driver
      mkdir -p "$TRITON_LIBCUDA_PATH"
      for library in /usr/lib/wsl/lib/lib{cuda,nvidia-,dxcore,d3d12}* $(
        PATH=/sbin:/usr/sbin:$PATH ldconfig -p 2>/dev/null |
          sed -n 's/.*x86-64.* => \(.*\/lib\(cuda\.so\|cudadebugger\|nvidia-\).*\)/\1/p'
      ); do
        if [ -e "$library" ]; then ln -sf "$library" "$TRITON_LIBCUDA_PATH/"; fi
      done
      find "$TRITON_LIBCUDA_PATH" -xtype l -delete # of a driver that is gone
    fi
    export TRITON_LIBCUDA_PATH LD_LIBRARY_PATH=''${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$TRITON_LIBCUDA_PATH
  '';
in
{
  inherit env;
  labtrain = "${
    pkgs.runCommand "labtrain"
      {
        script = ''
          #!${pkgs.runtimeShell}
          source ${driver}
          exec ${env}/bin/labtrain "$@"
        '';
      }
      ''
        mkdir -p $out/bin
        printf %s "$script" > $out/bin/labtrain
        chmod +x $out/bin/labtrain
      ''
  }/bin/labtrain";
  shell = pkgs.mkShell {
    # The standard environment brings the C compiler that Triton calls.
    packages = [ env ];
    shellHook = "source ${driver}";
  };
  # What containers/Containerfile makes, with Nix's Python, libraries and programs: `nix build .#image && ./result | docker load`.
  image = pkgs.dockerTools.streamLayeredImage {
    name = "labtrain";
    tag = "nix";
    # Not env: a link to its Python in /bin would make / its prefix.
    contents = [
      pkgs.bashInteractive
      pkgs.cacert
      pkgs.coreutils
      pkgs.gitMinimal
      pkgs.openssh
      pkgs.stdenv.cc
      pkgs.tini
    ];
    extraCommands = ''
      mkdir -p etc opt/labtrain lab experiment data tmp
      chmod 1777 lab tmp
      cp -r ${root + "/containers"} opt/labtrain/containers
      echo "root:x:0:0::/:/bin/sh" > etc/passwd
      echo "lab:x:1000:1000:lab:/lab:/bin/sh" >> etc/passwd
      printf 'root:x:0:\ntty:x:5:\nlab:x:1000:\n' > etc/group
      printf '[safe]\n\tdirectory = *\n' > etc/gitconfig
    '';
    config = {
      Entrypoint = [
        "tini"
        "--"
        "sh"
        "/opt/labtrain/containers/start.sh"
      ];
      User = "1000";
      WorkingDir = "/experiment";
      ExposedPorts = {
        "8888/tcp" = { };
        "2222/tcp" = { };
      };
      Env = [
        "PATH=${env}/bin:/bin"
        "HOME=/lab"
        "USER=lab"
        "LOGNAME=lab"
        "LANG=C.UTF-8"
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        # Where NVIDIA's toolkit puts the driver's libraries in an image that is not Debian's, and nothing else is.
        "LD_LIBRARY_PATH=/usr/lib64"
        "TRITON_LIBCUDA_PATH=/usr/lib64"
        "PYTHONNOUSERSITE=1"
      ];
    };
  };
  check = pkgs.runCommand "labtrain-check" { } "${env}/bin/labtrain --version > $out";
}
