//! A few seconds of chaos; the program itself goes on for as long as it is told.

use std::process::Command;

#[test]
fn killed_and_stopped_ranks_are_told_of_and_leave_nothing_behind() {
    let options = ["--seed", "1", "--kills", "20", "--seconds", "8", "--ranks", "6"];
    let output = Command::new(env!("CARGO_BIN_EXE_chaos")).args(options).output().expect("the program starts");
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{complained}");
}
