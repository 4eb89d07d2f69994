//! libfabric, loaded at run time: one binary serves machines with and without it.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use super::abi;
use crate::error::{Error, Result};

const NAME: &str = "libfabric.so.1";

/// The functions that libfabric exports; all others are in tables that its objects point to.
pub(super) struct Library {
    getinfo: unsafe extern "C" fn(
        version: u32,
        node: *const c_char,
        service: *const c_char,
        flags: u64,
        hints: *const abi::Info,
        info: *mut *mut abi::Info,
    ) -> c_int,
    freeinfo: unsafe extern "C" fn(*mut abi::Info),
    dupinfo: unsafe extern "C" fn(*const abi::Info) -> *mut abi::Info,
    fabric: unsafe extern "C" fn(*mut abi::FabricAttr, *mut *mut abi::FidFabric, *mut c_void) -> c_int,
    strerror: unsafe extern "C" fn(c_int) -> *const c_char,
    /// As `fi_version` says it.
    version: u32,
    /// Keeps the code mapped. A `Library` is never dropped: providers leave threads and exit handlers behind.
    _code: libloading::Library,
}

impl Library {
    /// The library, which the first call of the process loads.
    pub(super) fn get() -> Result<&'static Library> {
        static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        let loaded = LIBRARY.get_or_init(|| Library::open(NAME));
        loaded.as_ref().map_err(|why| Error::FabricLibrary { why: why.clone() })
    }

    fn open(name: &str) -> std::result::Result<Library, String> {
        let handlers = Handlers::now();
        // SAFETY: libfabric's initialisers register its providers. What else they touch is the handlers of signals.
        let code = unsafe { libloading::Library::new(name) };
        handlers.restore();
        let code = code.map_err(|err| err.to_string())?;
        // SAFETY: as declared in rdma/fabric.h.
        let fi_version: unsafe extern "C" fn() -> u32 = unsafe { function(&code, "fi_version")? };
        // SAFETY: it only returns a number.
        let version = unsafe { fi_version() };
        if version < abi::VERSION {
            return Err(format!("{name} is version {}, 1.17 is the oldest that can be used", shown(version)));
        }
        // SAFETY: as declared in rdma/fabric.h and rdma/fi_errno.h; the structures they take are compared by `abi`'s test.
        unsafe {
            Ok(Library {
                getinfo: function(&code, "fi_getinfo")?,
                freeinfo: function(&code, "fi_freeinfo")?,
                dupinfo: function(&code, "fi_dupinfo")?,
                fabric: function(&code, "fi_fabric")?,
                strerror: function(&code, "fi_strerror")?,
                version,
                _code: code,
            })
        }
    }

    /// The loaded version, such as "1.17".
    pub(super) fn version(&self) -> String {
        shown(self.version)
    }

    /// What the providers of this machine offer of what `hints` ask for; all of it without hints.
    pub(super) fn getinfo(&'static self, hints: Option<&Infos>) -> Result<Infos> {
        let mut first = std::ptr::null_mut();
        let hints = hints.map_or(std::ptr::null(), |h| h.first.cast_const());
        // SAFETY: `hints` is null or a whole `Info` of this library, node and service may be null, `first` is ours.
        let code = unsafe { (self.getinfo)(abi::VERSION, std::ptr::null(), std::ptr::null(), 0, hints, &mut first) };
        match i64::from(code) {
            0 => Ok(Infos { library: self, first }),
            // Nobody offers that.
            code if code == -abi::ENODATA => Ok(Infos { library: self, first: std::ptr::null_mut() }),
            code => Err(self.error("libfabric", "fi_getinfo", code)),
        }
    }

    /// An `Info` with all its parts, zeroed: to be filled in as hints.
    pub(super) fn hints(&'static self) -> Result<Infos> {
        // SAFETY: null asks for an empty one.
        let first = unsafe { (self.dupinfo)(std::ptr::null()) };
        if first.is_null() {
            return Err(Error::os("fi_allocinfo", std::io::ErrorKind::OutOfMemory));
        }
        Ok(Infos { library: self, first })
    }

    /// Opens the fabric that `info` describes.
    pub(super) fn open_fabric(&self, info: &abi::Info, provider: &str) -> Result<*mut abi::FidFabric> {
        let mut fabric = std::ptr::null_mut();
        // SAFETY: `info` came from `getinfo`, so it has fabric attributes; `fabric` is ours.
        let code = unsafe { (self.fabric)(info.fabric_attr, &mut fabric, std::ptr::null_mut()) };
        self.check(provider, "fi_fabric", code.into())?;
        Ok(fabric)
    }

    /// The text for an error number, of either sign.
    pub(super) fn text(&self, code: i64) -> String {
        // SAFETY: it takes any number.
        let text = unsafe { (self.strerror)(c_int::try_from(code.abs()).unwrap_or(c_int::MAX)) };
        string(text)
    }

    /// An error if `code`, which `call` has returned, is negative.
    pub(super) fn check(&self, provider: &str, call: &'static str, code: i64) -> Result<()> {
        if code < 0 { Err(self.error(provider, call, code)) } else { Ok(()) }
    }

    pub(super) fn error(&self, provider: &str, call: &'static str, code: i64) -> Error {
        Error::Fabric { provider: provider.to_owned(), call, why: self.text(code) }
    }
}

/// What the process does about signals.
///
/// libpsm_infinipath and libpsm2, which Debian's libfabric is linked with, take SIGSEGV, SIGINT and others for themselves as
/// soon as they are loaded, print a backtrace and end the process with exit code 1. Signals are the engine's.
struct Handlers(Vec<(c_int, libc::sigaction)>);

impl Handlers {
    fn now() -> Self {
        let action = |signal| {
            let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
            // SAFETY: without a new action the call only writes the present one.
            let known = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) } == 0;
            // SAFETY: a call that succeeds has written all of it.
            known.then(|| (signal, unsafe { action.assume_init() }))
        };
        // The signals of old: nobody takes others by accident.
        Handlers((1..32).filter_map(action).collect())
    }

    fn restore(self) {
        for (signal, action) in self.0 {
            // SAFETY: the action is what the process had a moment ago. SIGKILL and SIGSTOP are refused, and are as they were.
            unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
        }
    }
}

/// A function that a library exports.
///
/// # Safety
/// `F` is the function's type, and is used only as long as the library is loaded.
unsafe fn function<F: Copy>(code: &libloading::Library, name: &str) -> std::result::Result<F, String> {
    // SAFETY: the caller's promise.
    unsafe { code.get::<F>(name.as_bytes()) }.map(|f| *f).map_err(|err| err.to_string())
}

fn shown(version: u32) -> String {
    format!("{}.{}", version >> 16, version & 0xffff)
}

/// A text of the library, copied; empty for null.
pub(super) fn string(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the library's texts end with a zero byte, and live until its next call at least.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// A list of `Info`s, owned; maybe empty.
pub(super) struct Infos {
    library: &'static Library,
    first: *mut abi::Info,
}

// SAFETY: the list belongs to whoever has this; libfabric keeps no reference to it.
unsafe impl Send for Infos {}

impl Infos {
    pub(super) fn iter(&self) -> impl Iterator<Item = &abi::Info> {
        // SAFETY: each pointer is null or a whole `Info`, which lives as long as the list.
        let deref = |info: *mut abi::Info| unsafe { info.as_ref() };
        std::iter::successors(deref(self.first), move |info| deref(info.next))
    }

    /// Copies one entry of a list.
    pub(super) fn copy_of(&self, info: &abi::Info) -> Result<Infos> {
        // SAFETY: `info` is a whole one, of this library.
        let first = unsafe { (self.library.dupinfo)(info) };
        if first.is_null() {
            return Err(Error::os("fi_dupinfo", std::io::ErrorKind::OutOfMemory));
        }
        Ok(Infos { library: self.library, first })
    }

    /// The first entry, for calls that want it writable; null for an empty list.
    pub(super) fn as_ptr(&self) -> *mut abi::Info {
        self.first
    }
}

impl Drop for Infos {
    fn drop(&mut self) {
        if !self.first.is_null() {
            // SAFETY: the list came from `getinfo` or `dupinfo` and is freed once.
            unsafe { (self.library.freeinfo)(self.first) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_the_package_and_the_variables() {
        let why = Library::open("libfabric-that-nobody-has.so.1").err().unwrap();
        let text = Error::FabricLibrary { why }.to_string();
        for part in ["libfabric-that-nobody-has.so.1", "libfabric1", "LD_LIBRARY_PATH", "XCCL_FABRIC"] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
    }

    #[test]
    fn signals_stay_the_programs_own() {
        let own = |handlers: Handlers| {
            handlers.0.into_iter().map(|(s, a)| (s, a.sa_sigaction, a.sa_flags)).collect::<Vec<_>>()
        };
        let before = own(Handlers::now());
        if let Err(err) = Library::get() {
            eprintln!("skipped: {err}");
            return;
        }
        assert_eq!(own(Handlers::now()), before);
    }

    #[test]
    fn a_library_without_the_functions_is_refused_by_the_name_of_the_first() {
        let why = Library::open("libc.so.6").err().unwrap();
        assert!(why.contains("fi_version"), "{why}");
    }
}
