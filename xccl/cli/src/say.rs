//! What the tool says on standard output, which may be a pipe that is closed at any time (`| head`).

use std::fmt;
use std::io::{self, Write};

/// Writes a line; ends the process quietly when nobody reads it any more.
pub fn say_or_exit(line: fmt::Arguments<'_>) {
    if !try_say(line) {
        std::process::exit(0);
    }
}

/// Writes a line. False when nobody reads it any more.
pub fn try_say(line: fmt::Arguments<'_>) -> bool {
    // Another error than a closed pipe (a full disk) leaves the output as incomplete.
    writeln!(io::stdout(), "{line}").is_ok()
}

/// As `println`, see [`say_or_exit`].
macro_rules! say {
    ($($text:tt)*) => { $crate::say::say_or_exit(format_args!($($text)*)) };
}
pub(crate) use say;
