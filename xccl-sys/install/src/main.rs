//! Installs XCCL as a distribution would: libraries, headers, pkg-config file and CMake package under a prefix; and takes
//! them away again.
//!
//! The shared library is linked here from the static one, since cargo's own has neither a soname nor versioned symbols.

mod build;
mod names;

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use names::{MAJOR, VERSION};

/// Builds XCCL's C library and installs it.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Where programs are going to find it
    #[arg(long, env = "PREFIX", default_value = "/usr/local")]
    prefix: PathBuf,
    /// Put in front of the prefix for this installation only, as packagers do
    #[arg(long, env = "DESTDIR", default_value = "")]
    destdir: OsString,
    /// Folder of the libraries below the prefix
    #[arg(long, default_value = "lib")]
    libdir: PathBuf,
    /// Take away what an installation with this prefix has put there
    #[arg(long)]
    uninstall: bool,
}

/// What was installed, one path below the prefix per line.
const MANIFEST: &str = "share/xccl/installed.txt";

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.prefix.is_absolute(), "--prefix is {:?}: expected an absolute path", args.prefix);
    let plain = args.libdir.components().all(|part| matches!(part, Component::Normal(_)));
    ensure!(plain && args.libdir != Path::new(""), "--libdir is {:?}: expected a path below the prefix", args.libdir);
    // Joining an absolute path would forget what stands before it.
    let below_root = args.prefix.strip_prefix("/").unwrap_or(&args.prefix);
    let root = if args.destdir.is_empty() { args.prefix.clone() } else { Path::new(&args.destdir).join(below_root) };
    if args.uninstall { uninstall(&root) } else { install(&root, &args.libdir) }
}

/// One file of the installation.
struct Item {
    /// Below the prefix.
    path: PathBuf,
    content: Content,
}

enum Content {
    Text(String),
    Copy(PathBuf),
    Link(String),
}

fn install(root: &Path, libdir: &Path) -> Result<()> {
    let scratch = tempfile::tempdir().context("a temporary folder")?;
    let libraries = build::libraries(scratch.path())?;
    let mut items = vec![
        Item { path: libdir.join(names::shared_file()), content: Content::Copy(libraries.shared) },
        Item { path: libdir.join(names::soname()), content: Content::Link(names::shared_file()) },
        Item { path: libdir.join("libxccl.so"), content: Content::Link(names::soname()) },
        Item { path: libdir.join("libxccl.a"), content: Content::Copy(libraries.fixed) },
    ];
    for (file, template) in [
        ("pkgconfig/xccl.pc", include_str!("../templates/xccl.pc")),
        ("cmake/xccl/xccl-config.cmake", include_str!("../templates/xccl-config.cmake")),
        ("cmake/xccl/xccl-config-version.cmake", include_str!("../templates/xccl-config-version.cmake")),
    ] {
        items.push(Item { path: libdir.join(file), content: Content::Text(fill(template, libdir)) });
    }
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../include");
    for header in fs::read_dir(&include).with_context(|| format!("reading {include:?}"))? {
        let header = header?.path();
        let name = header.file_name().context("a header has a name")?;
        items.push(Item { path: Path::new("include").join(name), content: Content::Copy(header.clone()) });
    }

    // What an earlier installation has put elsewhere goes.
    let earlier = fs::read_to_string(root.join(MANIFEST)).unwrap_or_default();
    let stale = earlier.lines().map(Path::new).filter(|path| !items.iter().any(|item| item.path == *path));
    stale.into_iter().try_for_each(|path| remove(root, path))?;

    // Before anything else: an installation that breaks off can be taken away all the same.
    let list: String = items.iter().map(|item| format!("{}\n", item.path.display())).collect();
    put(root, &Item { path: MANIFEST.into(), content: Content::Text(list) })?;
    for item in &items {
        put(root, item)?;
        println!("{}", root.join(&item.path).display());
    }
    Ok(())
}

fn fill(template: &str, libdir: &Path) -> String {
    let up = |below: &str| vec![".."; libdir.join(below).components().count()].join("/");
    template
        .replace("@VERSION@", VERSION)
        .replace("@MAJOR_MINOR@", &names::major_minor())
        .replace("@MAJOR@", MAJOR)
        .replace("@LIBDIR@", &libdir.display().to_string())
        .replace("@SHARED_FILE@", &names::shared_file())
        .replace("@SONAME@", &names::soname())
        .replace("@PRIVATE_LIBS@", &names::PRIVATE_LIBS.map(|lib| format!("-l{lib}")).join(" "))
        .replace("@PRIVATE_LIBS_CMAKE@", &names::PRIVATE_LIBS.join(";"))
        .replace("@UP_FROM_PKGCONFIG@", &up("pkgconfig"))
        .replace("@UP_FROM_CMAKE@", &up("cmake/xccl"))
}

/// Puts a file in its place at once: a program that starts meanwhile finds the old one or the new one.
fn put(root: &Path, item: &Item) -> Result<()> {
    let to = root.join(&item.path);
    let folder = to.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder)
        .with_context(|| format!("{folder:?} cannot be made: choose a --prefix you may write"))?;
    let name = to.file_name().context("a file has a name")?.to_string_lossy();
    let new = folder.join(format!(".{name}.{}", std::process::id()));
    let failed = || format!("{to:?} cannot be written: choose a --prefix you may write");
    let written = match &item.content {
        Content::Text(text) => fs::write(&new, text),
        Content::Copy(from) => fs::copy(from, &new).map(drop),
        Content::Link(target) => std::os::unix::fs::symlink(target, &new),
    };
    let written = written.and_then(|()| match item.content {
        Content::Link(_) => Ok(()),
        _ => fs::set_permissions(&new, fs::Permissions::from_mode(mode_of(&name))),
    });
    let placed = written.and_then(|()| fs::rename(&new, &to));
    if placed.is_err() {
        let _ = fs::remove_file(&new);
    }
    placed.with_context(failed)
}

fn mode_of(name: &str) -> u32 {
    if name.contains(".so") { 0o755 } else { 0o644 }
}

fn uninstall(root: &Path) -> Result<()> {
    let manifest = root.join(MANIFEST);
    let list = fs::read_to_string(&manifest)
        .with_context(|| format!("{manifest:?} cannot be read: nothing is installed with this prefix"))?;
    list.lines().map(Path::new).chain([Path::new(MANIFEST)]).try_for_each(|path| {
        remove(root, path)?;
        println!("{}", root.join(path).display());
        Ok(())
    })
}

/// Removes a file that an installation has put there, and the folders that are empty then. The prefix itself stays.
fn remove(root: &Path, path: &Path) -> Result<()> {
    let below = path.components().all(|part| matches!(part, Component::Normal(_)));
    ensure!(below, "the list of installed files names {path:?}, which does not lie below the prefix");
    let file = root.join(path);
    match fs::remove_file(&file) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            return Err(err).with_context(|| format!("{file:?} cannot be removed"));
        }
        _ => {}
    }
    let mut folder = file.parent();
    while let Some(empty) = folder.filter(|f| *f != root && fs::remove_dir(f).is_ok()) {
        folder = empty.parent();
    }
    Ok(())
}
