//! The cache of compiled models: found again, repaired, refused, and sound after every end that a
//! writer can come to.
#![cfg(unix)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use common::{Folder, expect, json, shipped};

/// The entries of a cache, and what else is there.
fn entries(cache: &str) -> (Vec<String>, Vec<String>) {
    let names = fs::read_dir(cache).into_iter().flatten().flatten();
    let names = names.map(|e| e.file_name().into_string().expect("a name"));
    let (mut entries, rest): (Vec<_>, Vec<_>) = names.partition(|name| name.ends_with(".so"));
    entries.sort();
    (entries, rest)
}

fn arguments<'a>(model: &'a str, cache: &'a str) -> Vec<&'a str> {
    vec!["run", model, "-i", "random", "--dim", "batch=1", "--cache", cache, "-v"]
}

/// Runs the model and gives its results and what was said.
fn run(cache: &str, flags: &[&str]) -> (String, String) {
    expect(0, &[&arguments(&shipped("digits.onnx"), cache), flags].concat())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn what_was_compiled_is_found_again() {
    let folder = Folder::new();
    let cache = folder.path("new/cache");
    let model = shipped("digits.onnx");
    let bare = expect(0, &["run", &model, "-i", "random", "--dim", "batch=1"]).0;
    let (first, said) = run(&cache, &[]);
    assert!(said.contains("cache: compiled and kept in the cache"), "{said}");
    let (second, said) = run(&cache, &[]);
    assert!(said.contains("cache: found in the cache"), "{said}");
    assert!(bare == first && bare == second);
    assert_eq!(fs::metadata(&cache).expect("the folder").permissions().mode() & 0o777, 0o700);
    // What changes the code makes an entry of its own; the number of threads does not.
    for (flags, count) in [
        (&["--threads", "1"][..], 1),
        (&["--no-egraph"], 2),
        (&["--no-wide"], 3),
        (&["--max-nodes", "100"], 3),
    ] {
        run(&cache, flags);
        assert_eq!(entries(&cache).0.len(), count, "{flags:?}");
    }
    expect(0, &["run", &model, "-i", "random", "--dim", "batch=2", "--cache", &cache]);
    let (kept, rest) = entries(&cache);
    assert!(kept.len() == 4 && rest.is_empty(), "{kept:?} {rest:?}");
    // The other commands, and limits, which hold for what is found as well.
    let flags = ["--dim", "batch=1", "--cache", &cache, "-v"];
    let (_, said) = expect(0, &[&["verify", &model], &flags[..]].concat());
    assert!(said.contains("found in the cache"), "{said}");
    let bench = ["bench", &model, "--time", "1ms", "--warmup", "1ms"];
    let (_, said) = expect(0, &[&bench[..], &flags].concat());
    assert!(said.contains("found in the cache"), "{said}");
    expect(6, &[&arguments(&model, &cache)[..], &["--max-nodes", "3"]].concat());
}

#[test]
fn damaged_entries_are_replaced() {
    let folder = Folder::new();
    let cache = folder.path("cache");
    let (expected, _) = run(&cache, &[]);
    let entry = format!("{cache}/{}", entries(&cache).0[0]);
    let sound = fs::read(&entry).expect("the entry");
    let flipped = |at: usize| {
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        bytes
    };
    let mut damages = vec![Vec::new(), b"no library".to_vec(), sound[..sound.len() - 1].to_vec()];
    damages.extend((0..sound.len()).step_by(sound.len() / 20).map(flipped));
    for damage in damages {
        fs::write(&entry, damage).expect("the entry");
        let (found, said) = run(&cache, &[]);
        assert!(said.contains("compiled anew, the cache was damaged"), "{said}");
        assert!(found == expected && fs::read(&entry).expect("the entry") == sound);
    }
    // A sound entry under another name, one that others could write, a link and a folder.
    run(&cache, &["--no-egraph"]);
    let other = entries(&cache).0.into_iter().map(|name| format!("{cache}/{name}"));
    fs::copy(other.clone().find(|name| *name != entry).expect("another"), &entry).expect("a copy");
    let (found, said) = run(&cache, &[]);
    assert!(said.contains("it is named kiln_") && found == expected, "{said}");
    fs::set_permissions(&entry, fs::Permissions::from_mode(0o666)).expect("rights");
    let (found, said) = run(&cache, &[]);
    assert!(said.contains("others could write it") && found == expected, "{said}");
    fs::remove_file(&entry).expect("the entry");
    let outside = folder.write("outside.so", &sound);
    std::os::unix::fs::symlink(&outside, &entry).expect("a link");
    let (found, said) = run(&cache, &[]);
    assert!(said.contains("compiled anew") && found == expected, "{said}");
    assert!(fs::read(&outside).expect("the file").len() == sound.len());
    fs::remove_file(&entry).expect("the entry");
    fs::create_dir(&entry).expect("a folder");
    let (found, said) = run(&cache, &[]);
    assert!(said.contains("not kept in the cache") && found == expected, "{said}");
}

#[test]
fn folders_that_others_could_write_are_refused() {
    let folder = Folder::new();
    let model = shipped("digits.onnx");
    let open = folder.path("open");
    fs::create_dir(&open).expect("a folder");
    for mode in [0o770, 0o702] {
        fs::set_permissions(&open, fs::Permissions::from_mode(mode)).expect("rights");
        let (_, said) = expect(7, &arguments(&model, &open));
        assert!(said.contains("only its owner can write") && said.contains("chmod"), "{said}");
    }
    assert_eq!(json(7, &arguments(&model, &open))["diagnostics"][0]["code"], "K0921");
    let foreign = if is_root() {
        fs::set_permissions(&open, fs::Permissions::from_mode(0o700)).expect("rights");
        std::os::unix::fs::chown(&open, Some(1), None).expect("an owner");
        open
    } else {
        "/".to_string()
    };
    let (_, said) = expect(7, &arguments(&model, &foreign));
    assert!(said.contains("a folder of this user"), "{said}");
    let file = folder.write("file", b"");
    expect(7, &arguments(&model, &file));
}

#[test]
fn a_cache_that_cannot_be_written_is_no_failure() {
    let folder = Folder::new();
    let expected = run(&folder.path("other"), &[]).0;
    let closed = folder.path("closed");
    fs::create_dir(&closed).expect("a folder");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o500)).expect("rights");
    // Rights do not bind the superuser, but nobody makes files in this folder of the kernel's.
    let closed = if is_root() { "/sys/kernel".to_string() } else { closed };
    let (found, said) = run(&closed, &[]);
    assert!(said.contains("not kept in the cache") && found == expected, "{said}");
    // A disk that is full after some bytes.
    let full = folder.path("full");
    let model = shipped("digits.onnx");
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "sh"]);
    command.arg(env!("CARGO_BIN_EXE_kiln")).args(arguments(&model, &full));
    let output = command.output().expect("a shell");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("not kept in the cache"), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    assert_eq!(entries(&full), (vec![], vec![]));
}

#[test]
fn leftovers_of_ended_writers_are_removed_when_they_are_old() {
    let folder = Folder::new();
    let cache = folder.path("cache");
    run(&cache, &[]);
    fs::remove_file(format!("{cache}/{}", entries(&cache).0[0])).expect("the entry");
    let mut child = Command::new("true").spawn().expect("a command");
    child.wait().expect("its end");
    let (dead, alive) = (child.id(), std::process::id());
    let day = Duration::from_secs(24 * 3600);
    let leftover = |writer: u32, count: u32, age: Duration| {
        let name = format!("0123456789abcdef.{writer}.{count}.0.tmp");
        let file = fs::File::create(format!("{cache}/{name}")).expect("a file");
        file.set_modified(SystemTime::now() - age).expect("a time");
        name
    };
    leftover(dead, 0, day);
    let mut stay = vec![leftover(dead, 1, Duration::ZERO), leftover(alive, 2, day)];
    fs::write(format!("{cache}/notes"), "of the owner").expect("a file");
    stay.push("notes".into());
    run(&cache, &[]);
    let (kept, mut rest) = entries(&cache);
    rest.sort();
    stay.sort();
    assert_eq!((kept.len(), rest), (1, stay));
}

/// The library: many compilations at once, and shapes that come up one by one.
#[test]
fn specialisations_are_kept_as_well() {
    let folder = Folder::new();
    let cache = folder.path("cache");
    let model = kiln::Model::open(shipped("digits.onnx"), &kiln::Limits::default());
    let model = model.expect("the model");
    let images = |batch: usize| {
        let pixels: Vec<f32> = (0..batch * 64).map(|i| (i % 17) as f32).collect();
        kiln::tensor::Tensor::from_slice(&[batch, 1, 8, 8], &pixels)
    };
    let run = |compiler: &kiln::Compiler| -> Vec<kiln::tensor::Tensor> {
        let on_demand = compiler.on_demand(&model);
        let run = |batch| on_demand.run(&[("image", images(batch).view())]).expect("a run");
        [1, 3, 1, 2].map(|batch| run(batch).remove(0).1).to_vec()
    };
    let expected = run(&kiln::Compiler::new());
    let cached = kiln::Compiler::new().cache(&cache);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| assert!(run(&cached) == expected));
        }
    });
    let (kept, rest) = entries(&cache);
    assert!(kept.len() == 3 && rest.is_empty(), "{kept:?} {rest:?}");
    assert!(run(&cached) == expected);
    // One executable for a range is an entry of its own, and each range is.
    for (most, count) in [(8, 4), (9, 5), (8, 5)] {
        let ranged = cached.clone().dim_range("batch", 1..=most);
        let executable = ranged.compile_ranges(&model).expect("it compiles");
        let outputs = executable.run(&[("image", images(3).view())]).expect("a run");
        assert_eq!(outputs[0].1.shape(), [3, 10]);
        assert_eq!(entries(&cache).0.len(), count);
    }
}

fn start(cache: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(arguments(&shipped("digits.onnx"), cache));
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the command starts")
}

#[test]
fn writers_at_once_leave_one_sound_entry() {
    let folder = Folder::new();
    let cache = folder.path("cache");
    for _ in 0..4 {
        let children: Vec<Child> = (0..4).map(|_| start(&cache)).collect();
        for mut child in children {
            assert!(child.wait().expect("its end").success());
        }
        let (kept, rest) = entries(&cache);
        assert!(kept.len() == 1 && rest.is_empty(), "{kept:?} {rest:?}");
        let entry = format!("{cache}/{}", kept[0]);
        kiln::open_artifact(&entry).expect("a sound entry");
        fs::remove_file(entry).expect("the entry");
    }
}

/// `KILN_KILLS=1000` for all that is promised: half a minute on an idle machine.
#[test]
fn writers_that_are_killed_leave_no_bad_entry_and_block_nothing() {
    let kills = std::env::var("KILN_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(250);
    let folder = Folder::new();
    let cache = folder.path("cache");
    let begin = Instant::now();
    assert!(start(&cache).wait().expect("its end").success());
    // How long a writer takes; it follows the machine, which others may be using.
    let mut whole = begin.elapsed().as_nanos() as u64;
    let mut state = whole | 1;
    let (mut cut, mut left, mut kept) = (0, 0, 0);
    for _ in 0..kills {
        let (entries, _) = entries(&cache);
        entries.iter().for_each(|name| fs::remove_file(format!("{cache}/{name}")).expect("it"));
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let mut child = start(&cache);
        std::thread::sleep(Duration::from_nanos((state >> 33) % (whole * 3 / 2)));
        child.kill().expect("a signal");
        let killed = !child.wait().expect("its end").success();
        cut += usize::from(killed);
        whole = if killed { whole + whole / 16 } else { whole - whole / 16 };
        let (entries, rest) = self::entries(&cache);
        for name in &entries {
            kiln::open_artifact(format!("{cache}/{name}")).expect("a sound entry");
        }
        (left, kept) = (rest.len(), kept + entries.len());
    }
    println!("{cut} of {kills} writers were killed; {kept} entries, {left} temporary files");
    assert!(cut > kills / 4, "{cut} of {kills} were killed");
    let said = run(&cache, &[]).1;
    assert!(said.contains("kept in the cache") || said.contains("found in the cache"), "{said}");
    assert!(run(&cache, &[]).1.contains("found in the cache"));
}
