//! What the installed files are called.

/// The library's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Its first part.
pub const MAJOR: &str = env!("CARGO_PKG_VERSION_MAJOR");
const MINOR: &str = env!("CARGO_PKG_VERSION_MINOR");

/// What a program that links the static library needs besides.
pub const PRIVATE_LIBS: [&str; 5] = ["pthread", "dl", "m", "rt", "gcc_s"];

/// The part of the version that a program depends on: before 1.0 a minor version may break what the last one promised.
pub fn abi() -> String {
    if MAJOR == "0" { major_minor() } else { MAJOR.to_owned() }
}

/// The first two parts of the version.
pub fn major_minor() -> String {
    format!("{MAJOR}.{MINOR}")
}

/// The shared library's file.
pub fn shared_file() -> String {
    format!("libxccl.so.{VERSION}")
}

/// What programs that were linked with it look for.
pub fn soname() -> String {
    format!("libxccl.so.{}", abi())
}

/// The version of its symbols.
pub fn symbol_version() -> String {
    format!("XCCL_{}", abi())
}
