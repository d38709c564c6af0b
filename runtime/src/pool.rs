//! Threads that share one piece of work at a time and sleep in between.
//!
//! A job is a number of chunks and a function of the chunk's index. The caller works on it as
//! well, and never waits for a thread that has not begun: it closes the job when no chunk is left
//! and waits only for those that are in the middle of one.
//!
//! Every thread begins with a share of its own, chunks that follow one another, and the shares are
//! the same in every job: so what one job wrote is mostly read by the next on the same core. A
//! thread whose share is done takes chunks from the ends of others' shares. Which thread takes
//! which chunk stays open, so a chunk's result must not depend on it.
//!
//! ```
//! use kiln_runtime::pool::Pool;
//! use std::sync::atomic::{AtomicUsize, Ordering};
//! let pool = Pool::new(2)?;
//! let sum = AtomicUsize::new(0);
//! pool.run(10, &|chunk| { sum.fetch_add(chunk, Ordering::Relaxed); });
//! assert_eq!(sum.into_inner(), 45);
//! # Ok::<(), std::io::Error>(())
//! ```

use std::any::Any;
use std::cell::UnsafeCell;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread looks for the next job before it sleeps: several times what waking costs, so
/// that the gaps inside one run are bridged and an idle program is idle.
const SPIN: Duration = Duration::from_micros(50);

/// Set in [`Shared::gate`] while workers may join the job.
const OPEN: usize = 1 << (usize::BITS - 1);

/// A cache line of its own, so that writing it does not slow down readers of its neighbours.
/// Two lines, in fact: processors fetch them in pairs.
#[repr(align(128))]
struct Line<T>(T);

type Work<'a> = dyn Fn(usize) + Sync + 'a;

/// The job in progress; written by the caller while the gate is closed and nobody is inside.
#[derive(Clone, Copy)]
struct Job(*const Work<'static>);

/// What waiting workers look at and what they read next, on one line: it comes in one piece.
struct Post {
    /// Counts jobs; workers wait for it to change.
    epoch: AtomicU32,
    job: UnsafeCell<Option<Job>>,
}

/// Chunks that nobody has taken, `first..end`; the upper half of the word is the end.
struct Share(AtomicU64);

struct Shared {
    post: Line<Post>,
    /// For each thread, the chunks that it begins with; the caller's first.
    shares: Vec<Line<Share>>,
    /// [`OPEN`], and the number of workers inside the job.
    gate: Line<AtomicUsize>,
    /// Number of workers that sleep or are about to.
    asleep: Line<AtomicUsize>,
    /// The caller sleeps, or is about to, until the last worker has left.
    caller_asleep: AtomicBool,
    /// That caller.
    caller: Mutex<Option<Thread>>,
    /// The first panic of a worker in this job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
}

// SAFETY: `post.job` is the only part that is not `Sync` by itself. It is written by the one caller
// that holds `Pool::busy`, while the gate is closed and no worker is inside, and read by workers
// that are inside; entering and leaving the gate orders these.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer inside is used only while the caller waits in `Pool::run`.
unsafe impl Send for Shared {}

struct Worker {
    asleep: Arc<Line<AtomicBool>>,
    handle: Option<JoinHandle<()>>,
}

/// A pool of threads; dropping it ends them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    /// Held by the caller whose job is in progress.
    busy: Mutex<()>,
}

impl Pool {
    /// A pool for work on `threads` threads, the caller's included; 0 means as many as the system
    /// offers to this process.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(threads: usize) -> io::Result<Pool> {
        let threads = match threads {
            0 => thread::available_parallelism()?.get(),
            threads => threads,
        };
        let shared = Arc::new(Shared {
            post: Line(Post { epoch: AtomicU32::new(0), job: UnsafeCell::new(None) }),
            shares: (0..threads).map(|_| Line(Share(AtomicU64::new(0)))).collect(),
            gate: Line(AtomicUsize::new(0)),
            asleep: Line(AtomicUsize::new(0)),
            caller_asleep: AtomicBool::new(false),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
        });
        // A refused thread drops the pool, which ends those that were started.
        let mut pool = Pool { shared, workers: Vec::new(), busy: Mutex::new(()) };
        for index in 1..threads {
            let asleep = Arc::new(Line(AtomicBool::new(false)));
            let (shared, flag) = (pool.shared.clone(), asleep.clone());
            let handle = thread::Builder::new()
                .name(format!("kiln-{index}"))
                .spawn(move || shared.serve(index, &flag.0))?;
            pool.workers.push(Worker { asleep, handle: Some(handle) });
        }
        Ok(pool)
    }

    /// Number of threads that work on a job, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `work` with every index below `chunks`, each exactly once, and returns when all calls
    /// have. While another thread's job is in progress, or from inside a job, the caller works
    /// alone. A panic of `work` is passed on after all threads have left the job; chunks that
    /// were not begun by then are not run.
    pub fn run(&self, chunks: usize, work: &(dyn Fn(usize) + Sync)) {
        if let Ok(count) = u32::try_from(chunks)
            && count > 1
            && !self.workers.is_empty()
        {
            match self.busy.try_lock() {
                Ok(_guard) => return self.run_shared(count, work),
                // A job that panicked was closed in order all the same.
                Err(TryLockError::Poisoned(poisoned)) => {
                    let _guard = poisoned.into_inner();
                    return self.run_shared(count, work);
                }
                Err(TryLockError::WouldBlock) => {}
            }
        }
        (0..chunks).for_each(work);
    }

    fn run_shared(&self, chunks: u32, work: &Work<'_>) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Workers use the pointer only while they are inside the
        // gate, and this function does not return, nor unwind, before they have left.
        let work_static: *const Work<'static> = unsafe {
            std::mem::transmute::<*const Work<'_>, *const Work<'static>>(std::ptr::from_ref(work))
        };
        // SAFETY: `busy` is held and the gate is closed and empty since the last job.
        unsafe { *shared.post.0.job.get() = Some(Job(work_static)) };
        shared.deal(chunks);
        shared.gate.0.store(OPEN, Ordering::Release);
        // Ordered before the look at the sleepers: a worker counts itself before it looks at the
        // epoch for the last time, so one of the two sees the other.
        shared.post.0.epoch.fetch_add(1, Ordering::SeqCst);
        self.wake(chunks as usize - 1);
        let own = catch_unwind(AssertUnwindSafe(|| shared.take_chunks(0, work)));
        if own.is_err() {
            shared.give_up();
        }
        shared.close();
        let other = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = own.err().or(other) {
            resume_unwind(panic);
        }
    }

    /// Wakes as many workers as are wanted besides those that are awake.
    fn wake(&self, wanted: usize) {
        let asleep = self.shared.asleep.0.load(Ordering::SeqCst);
        let awake = self.workers.len().saturating_sub(asleep);
        let mut missing = wanted.saturating_sub(awake).min(asleep);
        for worker in &self.workers {
            if missing == 0 {
                break;
            }
            if worker.asleep.0.swap(false, Ordering::SeqCst) {
                worker.handle.as_ref().inspect(|handle| handle.thread().unpark());
                missing -= 1;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.post.0.epoch.fetch_add(1, Ordering::SeqCst);
        for handle in self.workers.iter_mut().filter_map(|worker| worker.handle.take()) {
            handle.thread().unpark();
            // Workers catch the panics of their jobs.
            let _ = handle.join();
        }
    }
}

impl Share {
    fn set(&self, chunks: Range<u32>) {
        self.0.store(u64::from(chunks.end) << 32 | u64::from(chunks.start), Ordering::Relaxed);
    }

    /// Takes one chunk, the first or the last.
    fn take(&self, last: bool) -> Option<usize> {
        let halves = |word: u64| (word as u32, (word >> 32) as u32);
        let rest = |word: u64| {
            let (first, end) = halves(word);
            let less = if last { 1 << 32 } else { u64::MAX };
            (first < end).then(|| word.wrapping_sub(less))
        };
        // What chunks are about is ordered by the gate.
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest);
        let (first, end) = halves(taken.ok()?);
        Some(if last { end - 1 } else { first } as usize)
    }
}

impl Shared {
    /// The life of a worker, which has the share of that number.
    fn serve(&self, own: usize, asleep: &AtomicBool) {
        let mut seen = 0;
        loop {
            seen = self.wait_for_job(seen, asleep);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if self.enter() {
                // SAFETY: inside the gate the job is set and stays as it is.
                let job = unsafe { *self.post.0.job.get() }.expect("an open job is set");
                // SAFETY: `run_shared` does not return before this worker has left.
                let work = unsafe { &*job.0 };
                let done = catch_unwind(AssertUnwindSafe(|| self.take_chunks(own, work)));
                if let Err(panic) = done {
                    self.give_up();
                    let mut first = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(panic);
                }
                self.leave();
            }
        }
    }

    fn wait_for_job(&self, seen: u32, asleep: &AtomicBool) -> u32 {
        let changed = || self.post.0.epoch.load(Ordering::SeqCst) != seen;
        if !spin_until(changed) {
            asleep.store(true, Ordering::SeqCst);
            self.asleep.0.fetch_add(1, Ordering::SeqCst);
            // `wake` takes the flag down, `drop` sets `stop`. A job that came in between did not
            // count this thread as asleep.
            if !changed() {
                while asleep.load(Ordering::SeqCst) && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
            }
            asleep.store(false, Ordering::SeqCst);
            self.asleep.0.fetch_sub(1, Ordering::SeqCst);
        }
        self.post.0.epoch.load(Ordering::SeqCst)
    }

    /// Gives every thread its share of that many chunks.
    fn deal(&self, chunks: u32) {
        let threads = self.shares.len() as u64;
        // At most `chunks`, so it fits.
        let bound = |thread: u64| (u64::from(chunks) * thread / threads) as u32;
        for (share, thread) in self.shares.iter().zip(0..) {
            share.0.set(bound(thread)..bound(thread + 1));
        }
    }

    /// Takes away all chunks that were not begun.
    fn give_up(&self) {
        self.shares.iter().for_each(|share| share.0.set(0..0));
    }

    fn take_chunks(&self, own: usize, work: &Work<'_>) {
        let (before, from) = self.shares.split_at(own);
        let shares = from.iter().chain(before);
        for (distance, share) in shares.enumerate() {
            while let Some(chunk) = share.0.take(distance > 0) {
                work(chunk);
            }
        }
    }

    /// Joins the job if it is open.
    fn enter(&self) -> bool {
        let join = |gate: usize| (gate & OPEN != 0).then_some(gate + 1);
        self.gate.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, join).is_ok()
    }

    /// Leaves the job; the last one out after it was closed wakes the caller.
    fn leave(&self) {
        let before = self.gate.0.fetch_sub(1, Ordering::SeqCst);
        if before == 1 && self.caller_asleep.load(Ordering::SeqCst) {
            let caller = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
            caller.as_ref().inspect(|caller| caller.unpark());
        }
    }

    /// Lets no more workers in and waits until all have left.
    fn close(&self) {
        let inside = self.gate.0.fetch_and(!OPEN, Ordering::SeqCst) & !OPEN;
        let empty = || self.gate.0.load(Ordering::SeqCst) == 0;
        if inside != 0 && !spin_until(empty) {
            let caller = || self.caller.lock().unwrap_or_else(PoisonError::into_inner);
            *caller() = Some(thread::current());
            self.caller_asleep.store(true, Ordering::SeqCst);
            while !empty() {
                thread::park();
            }
            self.caller_asleep.store(false, Ordering::SeqCst);
            *caller() = None;
        }
    }
}

/// Whether the condition became true within [`SPIN`].
fn spin_until(condition: impl Fn() -> bool) -> bool {
    let mut start = None;
    loop {
        for _ in 0..64 {
            if condition() {
                return true;
            }
            std::hint::spin_loop();
        }
        // The clock is read late: most waits end before.
        if start.get_or_insert_with(Instant::now).elapsed() >= SPIN {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_runs_once() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads).expect("threads");
            assert_eq!(pool.threads(), threads);
            for chunks in [0, 1, 2, 3, 64, 1000] {
                let counts: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(chunks, &|chunk| {
                    counts[chunk].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_jobs_in_a_row_with_and_without_gaps() {
        let pool = Pool::new(3).expect("threads");
        let sum = AtomicUsize::new(0);
        for job in 0..20_000 {
            pool.run(4, &|chunk| {
                sum.fetch_add(chunk, Ordering::Relaxed);
            });
            if job % 500 == 0 {
                thread::sleep(Duration::from_micros(200));
            }
        }
        assert_eq!(sum.into_inner(), 20_000 * 6);
    }

    #[test]
    fn both_threads_take_part() {
        let pool = Pool::new(2).expect("threads");
        let names = Mutex::new(std::collections::BTreeSet::new());
        let both = AtomicUsize::new(0);
        // Each of the two chunks waits for the other, so one thread alone would hang.
        pool.run(2, &|_| {
            both.fetch_add(1, Ordering::SeqCst);
            while both.load(Ordering::SeqCst) < 2 {
                thread::yield_now();
            }
            names.lock().expect("names").insert(thread::current().name().map(str::to_string));
        });
        assert!(names.into_inner().expect("names").contains(&Some("kiln-1".to_string())));
    }

    #[test]
    fn several_callers_and_nested_jobs_finish() {
        let pool = Pool::new(2).expect("threads");
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(3, &|_| {
                            pool.run(2, &|inner| {
                                sum.fetch_add(inner + 1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 500 * 3 * 3);
    }

    #[test]
    fn a_panic_is_passed_on_and_the_pool_lives() {
        let pool = Pool::new(2).expect("threads");
        for bad in 0..8 {
            let run = || {
                pool.run(8, &|chunk| {
                    thread::sleep(Duration::from_micros(100));
                    assert_ne!(chunk, bad, "chunk {bad} fails");
                })
            };
            let panic = catch_unwind(AssertUnwindSafe(run)).expect_err("a panic");
            let text = panic.downcast_ref::<String>().expect("a message");
            assert!(text.contains(&format!("chunk {bad} fails")), "{text}");
            let sum = AtomicUsize::new(0);
            pool.run(8, &|chunk| {
                sum.fetch_add(chunk, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 28);
        }
    }

    #[test]
    fn shares_are_dealt_evenly_and_taken_from_both_ends() {
        let pool = Pool::new(3).expect("threads");
        pool.shared.deal(8);
        let take = |share: usize, last| pool.shared.shares[share].0.take(last);
        assert_eq!([0, 1, 2].map(|share| take(share, false)), [Some(0), Some(2), Some(5)]);
        assert_eq!([0, 1, 2].map(|share| take(share, true)), [Some(1), Some(4), Some(7)]);
        assert_eq!([0, 1, 2].map(|share| take(share, false)), [None, Some(3), Some(6)]);
        assert_eq!([0, 1, 2].map(|share| take(share, true)), [None; 3]);
        pool.shared.deal(u32::MAX);
        assert_eq!(take(2, true), Some(u32::MAX as usize - 1));
        pool.shared.give_up();
        assert_eq!(take(2, true), None);
    }

    #[test]
    fn jobs_of_any_size_with_panics_between_them() {
        let pool = Pool::new(4).expect("threads");
        let mut state = 1_u32;
        for job in 0..3_000 {
            // xorshift32
            for shift in [13, -17, 5_i32] {
                state ^= if shift > 0 { state << shift } else { state >> -shift };
            }
            let chunks = (state % 40) as usize;
            let bad = (job % 7 == 0 && chunks > 0).then(|| state as usize / 64 % chunks);
            let counts: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
            let run = || {
                pool.run(chunks, &|chunk| {
                    counts[chunk].fetch_add(1, Ordering::Relaxed);
                    if Some(chunk) == bad {
                        resume_unwind(Box::new(chunk));
                    }
                })
            };
            let panic = catch_unwind(AssertUnwindSafe(run)).err();
            assert_eq!(panic.and_then(|p| p.downcast_ref::<usize>().copied()), bad);
            let counts: Vec<usize> = counts.into_iter().map(AtomicUsize::into_inner).collect();
            // Nothing runs twice; what was not begun before a panic may be left out.
            assert!(counts.iter().all(|&count| count == 1 || bad.is_some() && count == 0));
        }
    }

    #[test]
    fn pools_end_at_once_whether_their_threads_wait_or_sleep() {
        for gap in [0, 20, 500] {
            for _ in 0..20 {
                let pool = Pool::new(3).expect("threads");
                pool.run(5, &|_| {});
                thread::sleep(Duration::from_micros(gap));
                let begin = Instant::now();
                drop(pool);
                assert!(begin.elapsed() < Duration::from_secs(2));
            }
            drop(Pool::new(3).expect("threads"));
        }
    }
}
